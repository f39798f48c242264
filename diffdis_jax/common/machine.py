"""Count the CPU cores of this process; a container or a Slurm step may have fewer than the machine."""

from __future__ import annotations

import os
import pathlib

CGROUP = pathlib.Path("/sys/fs/cgroup")


def processors() -> int:
  """Count the cores that this process may run on; XLA splits its work by this number."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(cgroup: pathlib.Path = CGROUP) -> int:
  """Count the cores that are worth a process each. A container's CPU limit, such as docker's --cpus=1.5 or Kubernetes'
  limits.cpu, is rounded down, to at least one."""
  try:
    quota, period = map(int, (cgroup / "cpu.max").read_text().split())
  except (OSError, ValueError):  # no such file, or `max` for no limit
    return processors()
  return max(1, min(processors(), quota // period))
