"""DiffDis in JAX: one diffusion model that generates images from text and aligns images with text."""

import importlib.metadata
import pathlib
import tomllib


def _version() -> str:
  """Return pyproject.toml's version, as it was installed; in a checkout that is not installed, as it stands there."""
  try:
    return importlib.metadata.version("diffdis_jax")
  except importlib.metadata.PackageNotFoundError:
    file = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]


__version__ = _version()
