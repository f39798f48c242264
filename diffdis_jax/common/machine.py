"""Processor cores of this process, in a container or a Slurm step perhaps fewer than the machine has."""

from __future__ import annotations

import os
import pathlib

CGROUP = pathlib.Path("/sys/fs/cgroup")


def processors() -> int:
  """Count the cores that this process may run on, by which XLA splits its work."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(cgroup: pathlib.Path = CGROUP) -> int:
  """Count the cores that it is worth to start processes for. A container's limit in processor time, as docker's
  --cpus=1.5 or Kubernetes' limits.cpu, gives its whole cores, and at least one."""
  try:
    quota, period = map(int, (cgroup / "cpu.max").read_text().split())
  except (OSError, ValueError):  # no such file, or `max` for no limit
    return processors()
  return max(1, min(processors(), quota // period))
