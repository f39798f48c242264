"""Memory for the tests' processes: the machine's, or what the limits of a container leave of it."""

from __future__ import annotations

import os
import pathlib


def memory(cgroup: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> int:
  """Bytes."""
  found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
    if file.exists() and (limit := file.read_text().strip()).isdecimal():  # or `max`
      found.append(int(limit))
  return min(found)
