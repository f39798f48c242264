"""Which checkpoints of a run there are. Without Orbax, whose import takes seconds.

As a command, `python -m diffdis_jax.run.committed WORKDIR` writes the commit mark of each, a line each; where WORKDIR
ends in `/*`, of all runs in that folder.
"""

from __future__ import annotations

import sys

from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError, parse_json

COMMIT_MARK = "commit_success.txt"
METRICS = "metrics/metrics"  # in a checkpoint's folder, where Orbax writes and reads them


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


def latest_step(workdir: epath.PathLike) -> int | None:
  """The newest committed step of a run, or None."""
  return max(committed_steps(folder(workdir)), default=None)


def metrics_of(path: epath.Path, step: int) -> dict[str, float]:
  """What was measured when this checkpoint was saved; empty where nothing was.

  Raises:
    OSError: it cannot be read.
    UserError: it is damaged.
  """
  file = path / str(step) / METRICS
  found = parse_json(file.read_bytes(), str(file)) if file.exists() else {}
  if not isinstance(found, dict) or not all(isinstance(value, (int, float)) for value in found.values()):
    raise UserError(f"{file} should hold a number for each metric")
  return found


if __name__ == "__main__":
  parent, is_pattern, _ = sys.argv[1].partition("/*")
  for each in buckets.absolute(parent).iterdir() if is_pattern else [parent]:
    checkpoints = folder(each)
    sys.stdout.writelines(f"{checkpoints / str(step) / COMMIT_MARK}\n" for step in committed_steps(checkpoints))
