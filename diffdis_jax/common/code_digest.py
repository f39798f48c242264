"""A hash of the code that makes what is kept on disk, so that changed code does not find it again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1]


def _code(folder: pathlib.Path) -> list[pathlib.Path]:
  """Without what is no file, such as the link that an editor puts beside one that is being edited."""
  return [file for file in folder.rglob("*.py") if file.is_file()]


def _of_file(file: pathlib.Path) -> str:
  return hashlib.sha256(file.read_bytes()).hexdigest()


# As this is imported: who edits a file hours later, before a digest is asked for, does not change what runs here.
_OF_CODE = {file: _of_file(file) for file in _code(PACKAGE)}


def of(*paths: str, packages: tuple[str, ...] = ()) -> str:
  """The same on every machine with these files and versions.

  Args:
    paths: files of this package, or folders, of which every .py counts; relative to it, "." is all.
    packages: distributions whose installed versions count; one that is not installed counts as such.

  Raises:
    FileNotFoundError: there is no such path.
  """
  digest = hashlib.sha256()
  for path in (PACKAGE / path for path in paths):
    # Code, and no config: those are a link in a checkout and files in a wheel, and must not differ.
    found = (file for file in _code(path) if PACKAGE / "configs" not in file.parents)
    # Sorted, since a disk lists a folder in any order. The name counts too, so that a moved file is a change.
    for file in sorted(found) if path.is_dir() else [path]:
      of_file = _OF_CODE.get(file) or _of_file(file)
      digest.update(f"{file.relative_to(PACKAGE).as_posix()} {of_file}\n".encode())
  for name in packages:
    # A package that comes or goes is a change as well.
    digest.update(f"{name} {_version(name)}\n".encode())
  return digest.hexdigest()


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None
