"""Write files and folders whole or not at all, and read JSON."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from typing import IO, Any

from absl import logging
from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import FULL_DISK, UserError, may_pass, parse_json

# With what makes it unique.
_TEMPORARY = re.compile(r"(.+)\.(?:\d+|[a-z0-9_]{8})\.tmp")


def user_cache(name: str) -> str:
  """Name a folder of the user's cache directory."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  if home.startswith("~"):  # as it was: of a user without a home, as in a container
    home = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
  return os.path.join(home, "diffdis_jax", name)


def empty_folder(out: str | os.PathLike[str]) -> epath.Path:
  """Return the folder of this name, absent or empty.

  Raises:
    UserError: it has something in it, is no folder, or is where a disk is mounted, which nothing can replace.
  """
  folder = buckets.path(out)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--out={folder} is a file; it should be a folder, absent or empty")
  if folder.is_dir() and any(folder.iterdir()):
    raise UserError(f"--out={folder} is not empty; give a new folder")
  if not buckets.is_url(folder) and pathlib.Path(folder).is_mount():
    raise UserError(f"--out={folder} is where a disk is mounted; give a folder in it, such as {folder / 'out'}")
  return folder


@contextlib.contextmanager
def whole_folder(out: epath.PathLike, *, last: Collection[str] = ()) -> Iterator[pathlib.Path]:
  """Yield a local folder to write into. At the end it takes the name `out`, or is copied there, to a bucket.

  Args:
    out: absent or empty. It stays so if something goes wrong.
    last: names of files by which the folder is known to be whole. A bucket gets them after all others, since what was
      copied stays there when the process is killed.

  Raises:
    UserError: `out` is not empty, or cannot be written. What the caller reads meanwhile raises its own errors.
  """
  folder = empty_folder(out)
  if not buckets.is_url(folder):
    with _on_a_disk(pathlib.Path(folder).resolve()) as temporary:
      yield temporary
    return
  check_out(os.fspath(folder / "file"))  # before hours of work, which a bucket that there is not would lose
  with temporary_folder("diffdis-out") as temporary:
    yield temporary
    try:
      buckets.upload(temporary, folder, last=last)
    except BaseException:
      with contextlib.suppress(Exception):  # of the bucket, which must not take the place of what went wrong
        folder.rmtree()
      raise


@contextlib.contextmanager
def _on_a_disk(out: pathlib.Path) -> Iterator[pathlib.Path]:
  made = ""
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place: a rename cannot go from one disk to another.
    with temporary_folder(f".{out.name}", out.parent) as temporary:
      made = str(temporary)
      temporary.chmod(0o755)  # 700, as it is made, would stay and lock other users out
      yield temporary
      os.replace(temporary, out)  # which an empty folder gives way to
  except OSError as error:
    if made and error.errno not in FULL_DISK and not str(error.filename).startswith(made):
      raise  # of what is read meanwhile
    raise UserError(f"cannot write --out={out}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Raise UserError for an OSError within, unless it may pass. `what` is written to, such as --out=FILE."""
  try:
    yield
  except OSError as error:
    if may_pass(error):
      raise
    raise UserError(f"cannot write {what}: {error.strerror or error}") from error


def write_whole(path: epath.Path | pathlib.Path, content: bytes) -> None:
  """Write a file, under another name first; an object of a bucket appears whole by itself."""
  if buckets.is_url(path):
    path.write_bytes(content)
    return
  # A name of its own, so that two that write the same file do not mix their bytes. Not its process's number, which a
  # process of another machine or container may have too.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    with in_use(temporary, os.O_CREAT):
      temporary.write_bytes(content)
      temporary.replace(path)
  except BaseException:  # Ctrl-C too
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def in_use(temporary: str | os.PathLike[str], flags: int = 0, *, strict: bool = False) -> Iterator[None]:
  """Lock a temporary file or folder, so that `sweep` leaves it. Where a file system has no locks, nothing is swept.

  Raises:
    OSError: it is locked, or cannot be, and that is asked for by `strict`.
  """
  descriptor = os.open(temporary, os.O_RDONLY | flags, 0o666)
  try:
    with contextlib.nullcontext() if strict else contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(begin: str, within: str | os.PathLike[str] | None = None) -> Iterator[pathlib.Path]:
  """Yield a new folder, which is removed at the end, or, after a kill, when the next one is asked for.

  Args:
    begin: the beginning of its name.
    within: where it lies; None for the system's folder for temporary files.
  """
  place = within or tempfile.gettempdir()
  sweep(place, begin)
  # A thread that still writes into it at the end is no error, nor is that it was renamed.
  how: Any = dict(prefix=f"{begin}.", suffix=".tmp", dir=place, ignore_cleanup_errors=True)
  with tempfile.TemporaryDirectory(**how) as made, in_use(made):
    yield pathlib.Path(made)


def lock(file: IO[Any], *, wait: bool) -> None:
  """Keep an open file to this process until it is closed; where its file system has no locks, warn instead.

  Raises:
    BlockingIOError: another process has it, and this one is not to wait.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    raise
  except OSError as error:
    logging.warning("%s cannot be locked (%s); let no other process write there meanwhile", file.name, error.strerror)


def sweep(folder: str | os.PathLike[str], begin: str = "") -> None:
  """Remove what killed processes left in a local folder: all whose name begins so, or hidden files of any name."""
  for path in pathlib.Path(folder).glob("*.tmp"):
    found = _TEMPORARY.fullmatch(path.name)
    if found is None or (found[1] != begin if begin else path.is_dir() or not path.name.startswith(".")):
      continue
    # A lock fails while its process lives.
    with contextlib.suppress(OSError), in_use(path, os.O_NOFOLLOW | os.O_NONBLOCK, strict=True):
      shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_workdir(folder: str) -> None:
  """Raise UserError, before anything that may take long: no such folder can be made, read, or hold a checkpoint."""
  if buckets.is_url(folder):
    return
  path = pathlib.Path(folder)
  there = next(each for each in (path, *path.absolute().parents) if each.exists())
  if there == path and path.suffix == ".safetensors" and path.is_file():
    return  # a run in one file, which says itself what is wrong with it
  check_utf8(folder, "workdir")
  if not there.is_dir():
    raise UserError(f"--workdir={folder} cannot be: {there} is a file; give a folder")
  if not os.access(there, os.R_OK | os.X_OK):
    raise UserError(f"cannot read --workdir={folder}: {os.strerror(errno.EACCES)}; this user may not look into {there}")


def check_utf8(path: str | os.PathLike[str], flag: str) -> None:
  """Raise UserError for a path, named by a flag, in an encoding that no library of checkpoints or records takes."""
  try:
    os.path.abspath(path).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"--{flag}={os.fspath(path)!r} has a path that is not in UTF-8, where no checkpoint and no record can be written;"
      " take another folder"
    ) from error


def check_out(out: str, flag: str = "out") -> None:
  """Raise UserError, before work whose result would be lost: `out` is a folder, or no file of this name can be written.

  `flag` is the one that named it.
  """
  path = buckets.path(out)
  if path.is_dir():
    raise UserError(f"--{flag}={out} is a folder; it should name the file to write")
  if "://" not in out and not path.parent.is_dir():  # an object store has no empty folders
    raise UserError(f"--{flag}={out} lies in no folder that exists; create it first")
  if not buckets.is_url(path):
    sweep(path.parent, f".{path.name}")
  # Tried, since permissions say nothing of a disk that is full or read-only.
  probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  with writing(f"--{flag}={out}"):
    probe.write_bytes(b"")
    probe.unlink()


def write_out(out: str, text: str) -> None:
  """Write the file of --out. Raise UserError: it cannot be written."""
  with writing(f"--out={out}"):
    write_whole(buckets.path(out), text.encode())


def read_json(path: str | os.PathLike[str], name: str = "") -> Any:
  """Return the value in a JSON file, local or wherever etils.epath reads.

  Args:
    path: of the file.
    name: of it in the message; by default its path.

  Raises:
    UserError: there is none, it cannot be read, or it is not JSON.
    OSError: its storage cannot be reached.
  """
  name = name or os.fspath(path)
  try:
    content = buckets.read_bytes(path)
  except (OSError, ValueError) as error:  # the latter of a name that no file can have
    if may_pass(error):
      raise
    raise UserError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
  return parse_json(content, name)


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Return the JSON object in a file; an empty one of a file that is absent, damaged or out of reach."""
  if not buckets.is_url(path) and not pathlib.Path(path).is_file():  # a named pipe would be waited for
    return {}
  try:
    found = read_json(path)
  except Exception as error:
    # The first two are of a disk, and of a bucket where its package is missing; gcsfs has errors of its own besides.
    if not (isinstance(error, (OSError, UserError)) or may_pass(error)):
      raise
    return {}
  return found if isinstance(found, dict) else {}


def as_json(content: Any) -> str:
  """Return JSON for people to read."""
  return json.dumps(content, indent=2) + "\n"


def lines(path: epath.Path) -> list[str]:
  """Return the lines of a text file; none of an absent one. Bytes that a power cut left are replaced."""
  return path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Write a JSON file for people to read. Raise OSError where it cannot be written."""
  write_whole(buckets.path(path), as_json(content).encode())
