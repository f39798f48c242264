"""How many processes of ours a container has cores, and memory for the tests', for."""

from __future__ import annotations

import os

import jax
import pytest

from diffdis_jax.common import cli, machine
from tests.machine import memory

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
  "files, whole, size",
  [
    ({}, 64, MEMORY),
    ({"cpu.max": "max 100000", "memory.max": "max"}, 64, MEMORY),
    ({"cpu.max": "250000 100000", "memory.max": "4000000"}, 2, 4_000_000),
    ({"cpu.max": "50000 100000"}, 1, MEMORY),
    ({"memory/memory.limit_in_bytes": "9223372036854771712"}, 64, MEMORY),
    ({"memory/memory.limit_in_bytes": "5000000"}, 64, 5_000_000),
  ],
)
def test_a_containers_limits_count(tmp_path, monkeypatch, files, whole, size):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"{content}\n")
  assert (machine.cores(tmp_path), machine.processors(), memory(tmp_path)) == (whole, 64, size)


@pytest.mark.parametrize("whole, devices", [(1, 1), (3, 2), (4, 4), (64, 8)])
def test_a_container_has_no_more_devices_than_cores(monkeypatch, whole, devices):
  chosen = {}
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
  monkeypatch.setattr(machine, "cores", lambda: whole)
  monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  monkeypatch.setenv("XLA_FLAGS", "")
  cli.use_all_cores()
  assert chosen == {"jax_num_cpu_devices": devices}
