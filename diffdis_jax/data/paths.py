"""Tell which paths of a data set are files of its own, and how many may be open."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource


def open_many_files() -> None:
  """Let this process have as many open files as the system allows. A shell's own limit is often 1,024."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  for most in (2**16, 10_240):  # the latter of macOS, which takes no more
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= wanted:
      return
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_hidden(name: str) -> bool:
  """Say whether a file or folder is a program's own, such as .git, or macOS's beside others; ..b is not."""
  return name.startswith((".", "__MACOSX")) and not name.startswith("..")


def leads_out(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Say whether a file lies outside of a folder, by its name or by being a link.

  A folder that is a link is the user's. A link of the Hugging Face hub's cache leads from `snapshots/REVISION` into
  `blobs`, which counts as inside.
  """
  # By its name: ../x and an absolute one are outside.
  is_below = pathlib.Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
  if not is_below or not os.path.islink(path):
    return not is_below
  root = os.path.realpath(folder)
  cache, is_cached, _ = f"{root}/".rpartition("/snapshots/")
  inside = [os.path.realpath(path.parent), root, *([f"{cache}/blobs"] if is_cached else [])]
  return not any(pathlib.Path(os.path.realpath(path)).is_relative_to(each) for each in inside)
