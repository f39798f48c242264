"""Which checkpoints of a run there are. Without Orbax, whose import takes seconds."""

from __future__ import annotations

import json

from etils import epath

from diffdis_jax.run import buckets

COMMIT_MARK = "commit_success.txt"


def folder(workdir: epath.PathLike) -> epath.Path:
  """Of a run's checkpoints."""
  return buckets.absolute(workdir) / "checkpoints"


def all_steps(path: epath.Path) -> list[epath.Path]:
  """The checkpoints in that folder, whole or not, by step."""
  paths = [each for each in path.iterdir() if each.name.isdigit()] if path.is_dir() else []
  return sorted(paths, key=lambda each: int(each.name))


def committed_steps(path: epath.Path) -> list[int]:
  """Steps of the whole ones in that folder."""
  return [int(each.name) for each in all_steps(path) if (each / COMMIT_MARK).exists()]


def metrics_of(path: epath.Path, step: int) -> dict[str, float]:
  """What was measured when this checkpoint was saved; empty where nothing was.

  Raises:
    ValueError: it cannot be read.
  """
  file = path / str(step) / "metrics" / "metrics"
  return json.loads(file.read_text()) if file.exists() else {}
