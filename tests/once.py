"""Let parallel test processes share a folder that one of them makes."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import filelock
import pytest


def shared_folder(factory: pytest.TempPathFactory) -> pathlib.Path:
  """Return the folder that all processes of this run of the tests share."""
  base = factory.getbasetemp()
  return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
  """Return `name` in the shared folder. The first process that asks calls `make` for it, and the others wait."""
  path = shared_folder(factory) / name
  finished = path.with_name(f"{name}.finished")
  with filelock.FileLock(f"{path}.lock"):
    if not finished.exists():
      make(path)
      finished.touch()
  return path
