"""Which paths of a data set are files of its own, and how many may be open."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource

MOST_OPEN = (2**16, 10_240)  # files at a time that are asked for; the latter of macOS, which takes no more


def may_open() -> int:
  """Return how many files this process, and each that it starts, may have open: from here on as many as possible.

  A shell's own limit is often 1,024, which is for programs that do not ask for more.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  infinite = resource.RLIM_INFINITY  # of Linux -1
  for asked in MOST_OPEN:
    most = asked if hard == infinite else min(asked, hard)
    if soft == infinite or soft >= most:
      break
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
      return most
  return MOST_OPEN[0] if soft == infinite else soft


def is_hidden(name: str) -> bool:
  """Say whether a file or folder is a program's own, such as .git, or macOS's beside others; ..b is not."""
  return name.startswith((".", "__MACOSX")) and not name.startswith("..")


def is_below(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Say whether a path is below a folder by its name: ../x and an absolute one are not."""
  return pathlib.Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def leads_out(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Say whether a file lies outside of a folder, by its name or by being a link.

  A folder that is a link is the user's. A link of the Hugging Face hub's cache leads from `snapshots/REVISION` into
  `blobs`, which counts as inside.
  """
  if not is_below(path, folder) or not os.path.islink(path):
    return not is_below(path, folder)
  root = os.path.realpath(folder)
  cache, is_cached, _ = f"{root}/".rpartition("/snapshots/")
  inside = [os.path.realpath(path.parent), root, *([f"{cache}/blobs"] if is_cached else [])]
  return not any(pathlib.Path(os.path.realpath(path)).is_relative_to(each) for each in inside)
