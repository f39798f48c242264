"""Digests of a checkpoint's files, by which a damaged one is refused, or of any folder's. Without Orbax and jax.

They lie in `digests.json` in the folder; of a checkpoint they are written after the files and before the commit mark. A
CRC finds every flipped bit and every damaged stretch of up to 32 bits, and all but one in 4 billion of other damages.
It is CRC32C where google-crc32c is installed, which is three times as fast as zlib's CRC32. In a bucket it is what the
server keeps of each object: it is listed, so that no byte is read back.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError, may_pass, parse_json
from diffdis_jax.run import committed

NAME = "digests.json"
RECORDS = ".array_record"  # in the names of a prepared data set's files of records
# At the top of the folder, written after the digests. No restore looks into them.
_LATER = {NAME, committed.COMMIT_MARK, "_CHECKPOINT_METADATA"}
_CHUNK = 1 << 20  # bytes
_SMALL = 1 << 20  # bytes of a file that is checked before anything is read: of indices, shapes, positions
_THREADS = 4


class Damage(NamedTuple):
  """What is wrong with a checkpoint: a file, by its path in the checkpoint's folder, and what it is now."""

  file: str
  what: str


class _File(NamedTuple):
  size: int  # bytes
  digest: str  # hexadecimal


class Digests(NamedTuple):
  """Of a checkpoint, as they were saved. `algorithm`: crc32 or crc32c."""

  algorithm: str
  files: dict[str, _File]


def write(folder: epath.PathLike) -> None:
  """Writes the digests of all files that are in a folder now, such as a checkpoint's. Raises OSError."""
  path = buckets.path(folder)
  if buckets.is_url(path):
    # A server that keeps none has the objects read back.
    listed = {name: each if each.digest else _digest(path / name, "crc32c") for name, each in _listed(path).items()}
    algorithm, found = "crc32c", listed
  else:
    local = pathlib.Path(path)
    names = sorted(each.relative_to(local).as_posix() for each in local.rglob("*") if each.is_file())
    algorithm = "crc32" if _algorithm("crc32c") is None else "crc32c"
    with concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="digests") as pool:
      values = pool.map(lambda name: _digest(path / name, algorithm), names)
      found = dict(zip(names, values, strict=True))
  _write(path, Digests(algorithm, found))


def renew(folder: epath.PathLike, names: Collection[str]) -> None:
  """Writes the digests of these files of a folder again, which were written again; those of all others stay. Nothing
  where there are none, or the package for them is not installed. Raises OSError."""
  path = buckets.path(folder)
  found = read(path)
  if isinstance(found, Digests) and is_checkable(path, found):
    renewed = {name: _digest(path / name, found.algorithm) for name in names if (path / name).exists()}
    _write(path, Digests(found.algorithm, found.files | renewed))


def _write(path: epath.Path, found: Digests) -> None:
  content: dict[str, Any] = {"algorithm": found.algorithm}
  content["files"] = {name: file for name, file in sorted(found.files.items()) if name not in _LATER}
  # Its own, for a flipped bit in this very file.
  files.write_json(path / NAME, {**content, "crc32": _own(content)})


def read(folder: epath.Path) -> Digests | Damage | None:
  """The digests of a checkpoint, what is wrong with their file, or None where there is none."""
  try:
    content = parse_json((folder / NAME).read_bytes(), NAME)
    if content.pop("crc32") != _own(content):
      return Damage(NAME, "holds other bytes than were saved")
    return Digests(content["algorithm"], {name: _File(*file) for name, file in content["files"].items()})
  except FileNotFoundError:
    return None
  except (UserError, AttributeError, KeyError, TypeError) as error:
    return Damage(NAME, f"holds other bytes than were saved ({type(error).__name__})")


def fingerprint(folder: epath.PathLike, *, part: str) -> str:
  """Sixteen hexadecimal digits for the files with this in their names, by their digests, wherever the folder lies.

  Empty where there are none, or what holds these is damaged. Raises OSError.
  """
  found = read(buckets.path(folder))
  if not isinstance(found, Digests):
    return ""
  files_there = sorted((name, *file) for name, file in found.files.items() if part in name)
  return hashlib.sha256(json.dumps(files_there).encode()).hexdigest()[:16] if files_there else ""


def items_of(found: Digests, items: Collection[str] | None) -> list[str]:
  """Names of the files of these items, such as `params`, or of all for None; the smallest first."""
  names = [name for name in found.files if items is None or name.partition("/")[0] in items]
  return sorted(names, key=lambda name: (found.files[name].size, name))


def is_checkable(folder: epath.Path, found: Digests) -> bool:
  """Whether the package for this algorithm is installed, or none is needed."""
  return _algorithm(found.algorithm) is not None or buckets.is_url(folder)


def damage(folder: epath.PathLike, items: Collection[str] | None = None, *, ending: str = "") -> Damage | None:
  """What is wrong with the files of these items of a checkpoint, or of all, whose names end so; the first by size.

  None where all are whole, or there are no digests. Where they are not `is_checkable`, sizes alone are looked at.
  """
  path = buckets.path(folder)
  found = read(path)
  if not isinstance(found, Digests):
    return found
  names = (name for name in items_of(found, items) if name.endswith(ending))
  return _first(map(_checker(path, found), names))


def newest_whole(checkpoints: epath.Path, *, before: float = math.inf) -> int | None:
  """The newest step below `before` whose files are all as they were saved; None where none is known to be.

  Args:
    checkpoints: their folder.
    before: a step.
  """
  steps = (step for step in reversed(committed.committed_steps(checkpoints)) if step < before)
  for path in (checkpoints / str(step) for step in steps):
    found = read(path)
    if isinstance(found, Digests) and is_checkable(path, found) and damage(path) is None:
      return int(path.name)
  return None


class Checking(NamedTuple):
  """What a check beside the reading has found. `early`: in small files, before anything was read. `late` waits for the
  rest of the files, and says what is wrong in any."""

  early: Damage | None
  late: Callable[[], Damage | None]


@contextlib.contextmanager
def checking(folder: epath.Path, items: Collection[str] | None, *, share: slice = slice(None)) -> Iterator[Checking]:
  """Checks files in the background, beside whoever reads them meanwhile.

  Small files are checked before this yields: a flipped bit in an index may ask a reader for any number of bytes.

  Args:
    folder: of a checkpoint.
    items: of it, such as `params`; None for all.
    share: of the large files, where other processes check the rest.
  """
  found = read(folder)
  if not isinstance(found, Digests):
    if found is None and not share.start:  # once, and not on each host
      logging.warning("checkpoint %s has no %s, as those of earlier versions; it is read unchecked", folder, NAME)
    yield Checking(found, lambda: found)
    return
  if not is_checkable(folder, found) and not share.start:
    logging.warning(
      "checkpoint %s is read unchecked: its %s needs google-crc32c; pip install google-crc32c", folder, NAME
    )
  check, names = _checker(folder, found), items_of(found, items)
  small = [name for name in names if found.files[name].size <= _SMALL]
  early = _first(map(check, small))
  if early is not None:
    yield Checking(early, lambda: early)
    return
  pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="digests")
  results = [pool.submit(check, name) for name in names[len(small) :][share]]
  try:
    yield Checking(None, lambda: _first(each.result() for each in results))
  finally:
    pool.shutdown(cancel_futures=True)


def _first(results: Iterator[Damage | None]) -> Damage | None:
  return next((each for each in results if each is not None), None)


def _checker(folder: epath.Path, found: Digests) -> Callable[[str], Damage | None]:
  """What looks at one file of the checkpoint."""
  listed = _listed(folder) if buckets.is_url(folder) else None
  checkable = is_checkable(folder, found)

  def check(name: str) -> Damage | None:
    saved = found.files[name]
    try:
      now = listed.get(name) if listed is not None else _size(folder / name)
      if now is None:
        return Damage(name, "is missing")
      if now.size != saved.size:
        return Damage(name, f"has {now.size} bytes, not {saved.size} as saved")
      if not checkable:
        return None
      # The server keeps no CRC32, which one that was copied into a bucket may have.
      digest = now.digest if found.algorithm == "crc32c" else ""
      digest = digest or _digest(folder / name, found.algorithm).digest
    except OSError as error:
      if may_pass(error):
        raise
      return Damage(name, f"cannot be read: {error.strerror or error}")
    return None if digest == saved.digest else Damage(name, "holds other bytes than were saved")

  return check


def _listed(folder: epath.Path) -> dict[str, _File]:
  """The objects in a bucket, by the digests that the server keeps."""
  facts = buckets.files_below(folder)
  return {name: _File(each["size"], base64.b64decode(each.get("crc32c", "")).hex()) for name, each in facts.items()}


def _size(path: epath.Path) -> _File | None:
  try:
    return _File(os.stat(path).st_size, "")
  except FileNotFoundError:
    return None


def _digest(path: epath.Path, algorithm: str) -> _File:
  """Of a file's content, read in chunks."""
  extend, value, size = _algorithm(algorithm), 0, 0
  assert extend is not None
  with path.open("rb") as file:
    for chunk in iter(functools.partial(file.read, _CHUNK), b""):
      value, size = extend(chunk, value), size + len(chunk)
  return _File(size, f"{value:08x}")


def _algorithm(name: str) -> Callable[[bytes, int], int] | None:
  """Takes bytes, and the digest of those before them. None: the package for it is not installed."""
  if name == "crc32":
    return zlib.crc32
  try:
    import google_crc32c
  except ImportError:
    return None
  return lambda chunk, before: google_crc32c.extend(before, chunk)


def _own(content: dict[str, Any]) -> str:
  return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
