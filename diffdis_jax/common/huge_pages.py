"""Huge pages for a command on a CPU, where the kernel leaves them to programs.

A step's temporaries are tens of megabytes, and new each time. In pages of 4 KiB their first touch costs 12 to 27 % of a
small network's step.
"""

from __future__ import annotations

import glob
import os
import sys

from diffdis_jax.common import signals

_TUNABLES = "GLIBC_TUNABLES"
_WISH = "glibc.malloc.hugetlb=1"
_MODE = "/sys/kernel/mm/transparent_hugepage/enabled"
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def ask() -> None:
  """Starts the command of this process again, in it and before any import, with a C library that asks for them.

  The C library reads its settings when a process begins. Nothing is done where they are set already, in a process
  that is no command of the package, on a host with an accelerator, or where the kernel leaves no choice to programs.
  """
  if not signals.is_command() or _TUNABLES in os.environ or "LD_PRELOAD" in os.environ or not sys.executable:
    return
  if is_left_to_programs() and not any(map(glob.glob, _ACCELERATORS)):
    os.environ[_TUNABLES] = _WISH
    os.execv(sys.executable, sys.orig_argv)


def is_left_to_programs() -> bool:
  """Whether the kernel gives huge pages to those that ask, and to no others."""
  try:
    with open(_MODE) as file:
      return "[madvise]" in file.read()
  except OSError:
    return False
