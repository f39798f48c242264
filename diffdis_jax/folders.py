"""Output folders, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from diffdis_jax.structs import UserError


def check_empty(out: pathlib.Path) -> None:
  """Raises UserError if the folder exists with something in it, or is no folder."""
  if out.exists() and not out.is_dir():
    raise UserError(f"--out={out} is a file; it should be a folder, absent or empty")
  if out.is_dir() and any(out.iterdir()):
    raise UserError(f"--out={out} is not empty; give a new folder")


@contextlib.contextmanager
def whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder beside `out` to write into; it takes the name `out` at the end, and vanishes if something goes wrong.

  Raises:
    UserError: `out` is not empty, or cannot be written.
  """
  check_empty(out)
  temporary = None
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    temporary.chmod(0o755)
    yield temporary
    os.replace(temporary, out)
  except OSError as error:
    raise UserError(f"cannot write --out={out}: {error.strerror or error}") from error
  finally:
    if temporary is not None:
      shutil.rmtree(temporary, ignore_errors=True)
