"""What the compiler made of the tests' programs, kept from run to run: it is half of their time.

A key of jax's holds the program, the compiler's options and version, and the devices, so that what is found is what
would be compiled. What was compiled for a processor's features does not run where these lack: they name the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import shutil
from collections.abc import Iterator

import filelock

LIMIT = 2 * 2**30  # bytes kept: several times what one run of the tests needs


def kept_folder() -> pathlib.Path:
  """In the user's cache, for this machine's kind of processor."""
  from diffdis_jax.common import files  # only now, so that its annotations are checked like all the package's

  processor = platform.machine(), platform.processor(), os.cpu_count()
  described = pathlib.Path("/proc/cpuinfo")
  lines = described.read_text().splitlines() if described.exists() else []
  features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
  name = hashlib.sha256(repr((processor, features)).encode()).hexdigest()[:16]
  return pathlib.Path(files.user_cache("tests")) / name


def restore(folder: pathlib.Path) -> None:
  """What former runs kept, in this run's own folder. A run writes there alone: its commands may be killed."""
  folder.mkdir()
  with locked() as kept:
    for entry in entries(kept):
      link(entry, folder / entry.name)


def keep(folder: pathlib.Path) -> None:
  """What this run added, except for parts of entries. Beyond LIMIT goes what was not used for longest."""
  with locked() as kept:
    for entry in entries(folder):
      if not (kept / entry.name).exists() and is_whole(entry):
        part = kept / "part"
        part.unlink(missing_ok=True)  # of a run that was killed
        link(entry, part)
        os.replace(part, kept / entry.name)
    used = {entry: entry.stat() for entry in entries(kept)}
    size = 0
    for entry in sorted(used, key=lambda entry: -max(used[entry].st_atime, used[entry].st_mtime)):
      size += used[entry].st_size
      if size > LIMIT:
        entry.unlink()


@contextlib.contextmanager
def locked() -> Iterator[pathlib.Path]:
  """The kept folder, for this process alone."""
  kept = kept_folder()
  kept.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(kept / "lock"):
    yield kept


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
  return [*folder.glob("*-cache")]


def is_whole(entry: pathlib.Path) -> bool:
  from jax._src import compilation_cache

  try:
    return bool(compilation_cache.decompress_executable(entry.read_bytes()))
  except Exception:  # of whichever compressor there is
    return False


def link(source: pathlib.Path, target: pathlib.Path) -> None:
  """The same file under another name; a copy on another disk."""
  try:
    os.link(source, target)
  except OSError:
    shutil.copy2(source, target)
