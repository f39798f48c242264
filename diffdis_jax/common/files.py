"""Write files and folders whole or not at all, and read JSON."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from typing import IO, Any

from absl import logging
from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import FULL_DISK, UserError, may_pass, parse_json


def user_cache(name: str) -> str:
  """Return the path of a folder in the user's cache directory."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.join(home, "diffdis_jax", name)


def empty_folder(out: str | os.PathLike[str]) -> epath.Path:
  """Return the folder of this name, absent or empty. Raise UserError if it is neither, or is a mount point, which
  cannot be replaced."""
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
  """Yield a local folder to write into. At the end it is renamed to `out`, or copied there if `out` is in a bucket.

  Args:
    out: a folder that is absent or empty, and stays so if something goes wrong.
    last: names of files that mark the folder as complete. A bucket gets them after all others, since a killed process
      leaves what it has copied.

  Raises:
    UserError: `out` is not empty, or cannot be written.
  """
  folder = empty_folder(out)
  if buckets.is_url(folder):
    check_out(os.fspath(folder / "file"))  # check before hours of work, which a bucket that does not exist would lose
    with temporary_folder("diffdis-out") as temporary:
      yield temporary
      buckets.upload(temporary, folder, last=last)
    return
  target = pathlib.Path(folder).resolve()
  with contextlib.ExitStack() as stack:
    with writing(f"--out={out}"):
      target.parent.mkdir(parents=True, exist_ok=True)
      # Beside its final place, since a rename cannot move files between disks.
      temporary = stack.enter_context(temporary_folder(f".{target.name}", target.parent))
      temporary.chmod(0o755)  # the default 700 would remain, and lock other users out
    yield temporary
    with writing(f"--out={out}"):
      os.replace(temporary, target)  # it replaces an empty folder


def publish(write: Callable[[pathlib.Path], None], out: str, *, mark: str) -> None:
  """Have the folder `out` written. For one in a bucket, `write` gets a local folder, which is copied there, the file
  `mark` last, and removed. If it is killed, the same command resumes.

  Raises UserError: there is a `mark` at this address, or the bucket cannot be written.
  """
  if not buckets.is_url(out):
    return write(pathlib.Path(out))
  url = out.rstrip("/")
  if (buckets.path(url) / mark).exists():
    raise UserError(f"--out={url} holds a data set; name a new folder")
  check_out(f"{url}/{mark}")  # before hours of work that a mistyped bucket would not take
  # Named by the command, so that the same one, and no other, finds what it had prepared when it was killed.
  folder = pathlib.Path(user_cache("prepared"), hashlib.sha256("\0".join([url, *sys.argv]).encode()).hexdigest()[:32])
  logging.info("preparing %s in %s", url, folder)
  if not folder.exists():  # or else it was killed in copying
    write(folder)
  buckets.upload(folder, url, last={mark})
  shutil.rmtree(folder)
  logging.info("copied to %s", url)


@contextlib.contextmanager
def temporary_folder(begin: str, within: str | os.PathLike[str] | None = None) -> Iterator[pathlib.Path]:
  """Yield a new temporary folder. It is removed at the end, or after a kill when the next one is made.

  Args:
    begin: the beginning of its name.
    within: its parent; None for the system's folder for temporary files.
  """
  place = pathlib.Path(within or tempfile.gettempdir())
  how: Any = dict(prefix=f"{begin}.", suffix=".tmp", dir=place, ignore_cleanup_errors=True)
  with contextlib.ExitStack() as stack:

    def hold(folder: str | os.PathLike[str]) -> None:  # lock the folder while this process lives
      stack.callback(os.close, descriptor := os.open(folder, os.O_RDONLY | os.O_NOFOLLOW))
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    for remaining in place.glob(f"{begin}.????????.tmp"):
      with contextlib.suppress(OSError):  # another process holds it
        hold(remaining)
        shutil.rmtree(remaining)
    temporary = stack.enter_context(tempfile.TemporaryDirectory(**how))
    with contextlib.suppress(OSError):  # the file system has no locks
      hold(temporary)
    yield pathlib.Path(temporary)


def lock(file: IO[Any], *, wait: bool) -> None:
  """Lock an open file until it is closed. Warn if its file system has no locks.

  Raises BlockingIOError: another process has the lock, and `wait` is false.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    raise
  except OSError as error:
    logging.warning("%s cannot be locked (%s); let no other process write there meanwhile", file.name, error.strerror)


def write_whole(path: epath.Path | pathlib.Path, content: bytes) -> None:
  """Write a file under a temporary name first; an object in a bucket is always written whole."""
  if buckets.is_url(path):
    path.write_bytes(content)
    return
  # A unique name, so that two processes that write the same file do not mix their bytes.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    temporary.write_bytes(content)
    temporary.replace(path)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Raise UserError for an OSError in the block, unless it may pass or a disk is full. `what` names the target, such as
  --out=FILE."""
  try:
    yield
  except OSError as error:
    if may_pass(error) or error.errno in FULL_DISK:  # launchers retry after these
      raise
    raise UserError(f"cannot write {what}: {error.strerror or error}") from error


def check_out(out: str, flag: str = "out") -> None:
  """Raise UserError, before any work, if `out` is a folder or no file of this name can be written.

  `flag` is the flag that named it, for messages.
  """
  path = buckets.path(out)
  if path.is_dir():
    raise UserError(f"--{flag}={out} is a folder; it should name the file to write")
  if not buckets.is_url(out) and not path.parent.is_dir():  # object stores have no empty folders
    raise UserError(f"--{flag}={out} lies in no folder that exists; create it first")
  # Try it, since permissions do not show a full or read-only disk.
  with writing(f"--{flag}={out}"):
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    probe.write_bytes(b"")
    probe.unlink()


def write_out(out: str, text: str) -> None:
  """Write the file of --out. Raise UserError if it cannot be written."""
  with writing(f"--out={out}"):
    write_whole(buckets.path(out), text.encode())


def read_json(path: str | os.PathLike[str], name: str = "") -> Any:
  """Return the value in a JSON file, local or in a bucket. `name` is its name in messages, by default its path.

  Raises:
    UserError: there is no such file, it cannot be read, or it is not JSON.
    OSError: its storage cannot be reached.
  """
  name = name or os.fspath(path)
  try:
    content = buckets.path(path).read_bytes()
  except (OSError, ValueError) as error:  # ValueError is for a name that no file can have
    if may_pass(error):
      raise
    raise UserError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
  return parse_json(content, name)


def read_text(file: str, flag: str) -> str:
  """Return the text of a file that a flag names, without the mark that some editors put first. Raise UserError if it
  cannot be read."""
  try:
    return pathlib.Path(file).read_text(encoding="utf-8-sig")
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {flag}={file}: {error}; it should be a text file") from error


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Return the JSON object in a file, or {} if the file is absent, damaged or unreachable."""
  try:
    content = read_json(path)
  except Exception as error:
    if not (isinstance(error, UserError) or may_pass(error)):
      raise
    return {}
  return content if isinstance(content, dict) else {}


def as_json(content: Any) -> str:
  """Return JSON for people to read."""
  return json.dumps(content, indent=2) + "\n"


def lines(path: epath.Path) -> list[str]:
  """Return the lines of a text file, or none if it is absent. Bytes that a power cut damaged are replaced."""
  return path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Write a JSON file for people to read. Raise OSError if it cannot be written."""
  write_whole(buckets.path(path), as_json(content).encode())
