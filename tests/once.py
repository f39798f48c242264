"""What the tests make once: the processes that run them side by side share it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import filelock
import pytest


def shared_folder(factory: pytest.TempPathFactory) -> pathlib.Path:
  """Of this run of the tests, whichever of its processes asks."""
  base = factory.getbasetemp()
  return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
  """The shared folder's `name`, which the first process that asks lets `make` write, while the others wait."""
  path = shared_folder(factory) / name
  finished = path.with_name(f"{name}.finished")
  with filelock.FileLock(f"{path}.lock"):
    if not finished.exists():
      make(path)
      finished.touch()
  return path
