"""Processor cores of this process, in a container or a Slurm step perhaps fewer than the machine has."""

from __future__ import annotations

import contextlib
import os
import pathlib

CGROUP = pathlib.Path("/sys/fs/cgroup")


def processors() -> int:
  """Count the cores that this process may run on, by which XLA splits its work."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(cgroup: pathlib.Path = CGROUP) -> int:
  """Count the cores that it is worth to start processes for. A container's limit in processor time, as docker's
  --cpus=1.5 or Kubernetes' limits.cpu, gives its whole cores, and at least one."""
  version_1 = [n for name in ("quota", "period") for n in limits(cgroup / "cpu" / f"cpu.cfs_{name}_us")]
  # No limit is `max` in version 2 of cgroups, which is no number, and -1 in version 1.
  quota, period = limits(cgroup / "cpu.max") or version_1 or (-1, 1)
  return max(1, min(processors(), quota // period)) if quota > 0 else processors()


def limits(file: pathlib.Path) -> tuple[int, ...]:
  """Return the numbers of a control group's file; empty where there is no such file, or no limit in it."""
  with contextlib.suppress(OSError, ValueError):
    return tuple(map(int, file.read_text().split()))
  return ()
