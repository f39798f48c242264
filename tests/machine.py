"""Memory for the tests' processes: the machine's, or what the limits of a container leave of it."""

from __future__ import annotations

import os
import pathlib


def memory(cgroup: pathlib.Path | None = None) -> int:
  """Bytes."""
  from diffdis_jax.common import machine  # only now, so that its annotations are checked like all the package's

  folder = cgroup or machine.CGROUP
  found = machine.limits(folder / "memory.max") or machine.limits(folder / "memory" / "memory.limit_in_bytes")
  return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *found])
