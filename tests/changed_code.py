"""A copy of the package in which a test may change code, for what keeps results by a hash of it."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from diffdis_jax.common import code_digest


def copy_package(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  """The copy, which is what is hashed from now on."""
  copy = shutil.copytree(code_digest.PACKAGE, folder / "package", ignore=shutil.ignore_patterns("__pycache__"))
  monkeypatch.setattr(code_digest, "PACKAGE", copy)
  return copy


def change(file: pathlib.Path) -> None:
  """Adds a line."""
  file.write_bytes(file.read_bytes() + b"\n# Another line.\n")
