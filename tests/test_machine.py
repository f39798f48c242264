"""How many processes the tests have in a container."""

from __future__ import annotations

import os

import pytest

from tests import machine

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
  "files, cores, memory",
  [
    ({}, 64, MEMORY),
    ({"cpu.max": "max 100000", "memory.max": "max"}, 64, MEMORY),
    ({"cpu.max": "250000 100000", "memory.max": "4000000"}, 2, 4_000_000),
    ({"cpu.max": "50000 100000"}, 1, MEMORY),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64, MEMORY),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3, MEMORY),
    ({"memory/memory.limit_in_bytes": "9223372036854771712"}, 64, MEMORY),
    ({"memory/memory.limit_in_bytes": "5000000"}, 64, 5_000_000),
  ],
)
def test_a_containers_limits_count(tmp_path, monkeypatch, files, cores, memory):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"{content}\n")
  assert (machine.cores(tmp_path), machine.memory(tmp_path)) == (cores, memory)
