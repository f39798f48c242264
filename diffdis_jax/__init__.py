"""DiffDis in JAX: one diffusion model that generates images from text and aligns images with text."""

import importlib.metadata
import os
import pathlib
import tomllib
from typing import Any

try:
  __version__ = importlib.metadata.version("diffdis_jax")
except importlib.metadata.PackageNotFoundError:  # in a checkout that is not installed
  _pyproject = pathlib.Path(__file__).parents[1] / "pyproject.toml"
  __version__ = tomllib.loads(_pyproject.read_text(encoding="utf-8"))["project"]["version"]


def load(path: str | os.PathLike[str]) -> Any:
  """Load a trained model, by its workdir or the name of an included one: see `diffdis_jax.pipeline.Pipeline`."""
  # By name, and only now: what is needed for the version alone imports no jax.
  return importlib.import_module("diffdis_jax.pipeline").load(path)
