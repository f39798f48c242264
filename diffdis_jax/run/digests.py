"""Digests of a folder's files, by which a damaged or missing file is found. This file imports neither Orbax nor jax.

`digests.json` has the size and the CRC32C of each file of a checkpoint, of prepared data or of exported weights. That
of a checkpoint is written after the other files and before the commit mark, and also has the step and the run. The
server of a bucket computes the same digest of each object, so that objects need not be read.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import google_crc32c
from etils import epath

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError, parse_json

NAME = "digests.json"
RECORDS = ".array_record"  # part of the names of the files of records of a prepared data set
COMMIT_MARK = "commit_success.txt"  # the last file that Orbax writes into a checkpoint
ORBAX = "_CHECKPOINT_METADATA"  # Orbax's description of a checkpoint
# Orbax writes the last two after the digests. No restore reads them.
_NOT_LISTED = {NAME, COMMIT_MARK, ORBAX}
_THREADS = 4
_OTHER_BYTES = "holds other bytes than were saved"


class Damage(NamedTuple):
  """A damaged file, by its path in the folder, and what is wrong with it."""

  file: str
  what: str


class _File(NamedTuple):
  size: int  # bytes
  digest: str  # CRC32C, hexadecimal


class Digests(NamedTuple):
  """The files of a folder when they were written. `step` and `run` are of a checkpoint."""

  files: dict[str, _File]
  step: int | None = None
  run: str | None = None


def write(folder: epath.PathLike, *, step: int | None = None, run: str | None = None) -> None:
  """Write the digests of all files that are in a folder now. For a checkpoint they also have its `step`, and the digest
  of its `run`, `workdir.run_digest`."""
  path = buckets.path(folder)
  if buckets.is_url(path):
    # Objects are read back if their server has no digests.
    written = {name: file if file.digest else _digest(path / name) for name, file in _listed(path).items()}
  else:
    local = pathlib.Path(path)
    names = sorted(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      written = dict(zip(names, pool.map(lambda name: _digest(path / name), names), strict=True))
  _write(path, Digests(written, step, run))


def _write(path: epath.Path, written: Digests) -> None:
  listed = {name: file for name, file in sorted(written.files.items()) if name not in _NOT_LISTED}
  content = {"files": listed} | {name: getattr(written, name) for name in ("step", "run") if written.step is not None}
  files.write_json(path / NAME, {**content, "crc32c": _own(content)})


def read(folder: epath.PathLike) -> Digests | Damage | None:
  """Read the digests of a folder; return None if it has none, or what is wrong with their file."""
  path = buckets.path(folder) / NAME
  if not path.exists():
    return None
  content: Any = None
  with contextlib.suppress(UserError):
    content = parse_json(path.read_bytes(), NAME)
  if not isinstance(content, dict) or content.pop("crc32c", "") != _own(content):
    return Damage(NAME, _OTHER_BYTES)
  return Digests({name: _File(*file) for name, file in content.pop("files").items()}, **content)


def fingerprint(folder: epath.PathLike, *, part: str) -> str:
  """Return sixteen hexadecimal digits for the files with `part` in their names, independent of the folder's path, or ""
  if the digests are missing or damaged."""
  saved = read(folder)
  if not isinstance(saved, Digests):
    return ""
  listed = sorted((name, *file) for name, file in saved.files.items() if part in name)
  return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16] if listed else ""


def damage(folder: epath.PathLike, *, ending: str | tuple[str, ...] = "") -> Damage | None:
  """Return the damage of the smallest damaged file whose name has this ending, or one of these. None if all are whole
  or the folder has no digests."""
  return _first_damage(buckets.path(folder), read(folder), lambda name: name.endswith(ending))


def damage_of_step(path: epath.Path, run: str, items: Collection[str] | None = None) -> Damage | None:
  """Return the damage of a checkpoint's smallest damaged file, also if the checkpoint is of another step or run.

  Args:
    path: the folder of a committed checkpoint, which has digests.
    run: the digest of its workdir's config, `workdir.run_digest`.
    items: the items to check, such as `params`; None for all.
  """
  saved = read(path)
  if saved is None:
    return Damage(NAME, "is missing")
  if isinstance(saved, Digests) and saved.step != int(path.name):
    return Damage(NAME, f"says that it was saved as step {saved.step}")
  if isinstance(saved, Digests) and saved.run not in ("", run):  # "" was saved if there was no config.json
    return Damage(NAME, "says that it was saved by a run of another config than config.json has")
  return _first_damage(path, saved, lambda name: items is None or name.partition("/")[0] in items)


def _first_damage(path: epath.Path, saved: Digests | Damage | None, asked: Callable[[str], bool]) -> Damage | None:
  if not isinstance(saved, Digests):
    return saved
  names = sorted(filter(asked, saved.files), key=lambda name: (saved.files[name].size, name))
  listed = _listed(path) if buckets.is_url(path) else None
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return next(filter(None, pool.map(lambda name: _compare(path, name, saved.files[name], listed), names)), None)


def _compare(path: epath.Path, name: str, saved: _File, listed: Mapping[str, _File] | None) -> Damage | None:
  try:
    present = _File((path / name).stat().length, "") if listed is None else listed[name]
    if present.size != saved.size:
      return Damage(name, f"has {present.size} bytes, not {saved.size} as saved")
    same = (present if present.digest else _digest(path / name)) == saved
  except (FileNotFoundError, KeyError):
    return Damage(name, "is missing")
  return None if same else Damage(name, _OTHER_BYTES)


def _listed(folder: epath.Path) -> dict[str, _File]:
  """List the objects in a bucket, with the digests of their server."""
  listed = buckets.files_below(folder).items()
  return {name: _File(facts["size"], base64.b64decode(facts.get("crc32c", "")).hex()) for name, facts in listed}


def _digest(path: epath.Path) -> _File:
  checksum, size = google_crc32c.Checksum(), 0
  with path.open("rb") as file:
    for chunk in checksum.consume(file, 1 << 20):
      size += len(chunk)
  return _File(size, checksum.digest().hex())


def _own(content: Mapping[str, Any]) -> str:
  """Return the digest of the digests themselves."""
  return google_crc32c.Checksum(json.dumps(content, sort_keys=True).encode()).digest().hex()
