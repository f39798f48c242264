"""Test that the CPU limit of a container counts as its number of cores."""

from __future__ import annotations

import os

import pytest

from diffdis_jax.common import machine


@pytest.mark.parametrize("limit, num_cores", [("", 64), ("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_containers_limits_count(tmp_path, monkeypatch, limit, num_cores):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
  if limit:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
  assert (machine.cores(tmp_path), machine.processors()) == (num_cores, 64)
