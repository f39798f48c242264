"""Cores and memory for the tests' processes: the machine's, or what the limits of a container leave of them."""

from __future__ import annotations

import contextlib
import os
import pathlib

CGROUP = pathlib.Path("/sys/fs/cgroup")


def cores(cgroup: pathlib.Path = CGROUP) -> int:
  """Of a limit in processor time, as docker's --cpus=1.5, the whole ones, and at least one."""
  found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  version_1 = [n for name in ("quota", "period") for n in _numbers(cgroup / "cpu" / f"cpu.cfs_{name}_us")]
  # No limit is `max` in version 2 of cgroups, which is no number, and -1 in version 1.
  quota, period = _numbers(cgroup / "cpu.max") or version_1 or (-1, 1)
  return max(1, min(found, quota // period)) if quota > 0 else found


def memory(cgroup: pathlib.Path = CGROUP) -> int:
  """Bytes."""
  limits = _numbers(cgroup / "memory.max") or _numbers(cgroup / "memory" / "memory.limit_in_bytes")
  return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def _numbers(file: pathlib.Path) -> tuple[int, ...]:
  """Empty where there is no such file, or no limit in it."""
  with contextlib.suppress(OSError, ValueError):
    return tuple(map(int, file.read_text().split()))
  return ()
