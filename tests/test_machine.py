"""The number of cores that a container may use, and of devices."""

from __future__ import annotations

import os

import jax
import pytest

from diffdis_jax.common import cli, machine


@pytest.mark.parametrize("limit, whole", [("", 64), ("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_containers_limits_count(tmp_path, monkeypatch, limit, whole):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
  if limit:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
  assert (machine.cores(tmp_path), machine.processors()) == (whole, 64)


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
