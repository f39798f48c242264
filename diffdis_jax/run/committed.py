"""The checkpoints that a run has. Without Orbax, whose import takes seconds.

As a command, `python -m diffdis_jax.run.committed WORKDIR` writes the commit mark of each, a line each; where WORKDIR
ends in `/*`, those of all runs in that folder.
"""

from __future__ import annotations

import concurrent.futures
import re
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError, parse_json

COMMIT_MARK = "commit_success.txt"
METRICS = "metrics/metrics"  # in a checkpoint's folder, where Orbax writes and reads them
_AT_ONCE = 32  # checkpoints that are looked at
_STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # as Orbax writes it; `isdigit` is true of ² too
_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


def folder(workdir: epath.PathLike) -> epath.Path:
  """Give the folder of a run's checkpoints."""
  return buckets.absolute(workdir) / "checkpoints"


def all_steps(path: epath.Path) -> list[epath.Path]:
  """List the checkpoints in that folder, whole or not, by step."""
  paths = [each for each in path.iterdir() if _STEP.fullmatch(each.name)] if path.is_dir() else []
  return sorted(paths, key=lambda each: int(each.name))


def is_committed(path: epath.Path) -> bool:
  """Tell whether a checkpoint's folder is that of a whole one."""
  return (path / COMMIT_MARK).exists()


def of_each(look: Callable[[_Asked], _Answer], checkpoints: Iterable[_Asked]) -> list[_Answer]:
  """Look at each of them, many at a time: a run may have a thousand, and a bucket takes tens of milliseconds."""
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="checkpoints") as pool:
    return [*pool.map(look, checkpoints)]


def committed_steps(path: epath.Path) -> list[int]:
  """List the steps of the whole checkpoints in that folder."""
  paths = all_steps(path)
  return [int(each.name) for each, whole in zip(paths, of_each(is_committed, paths), strict=True) if whole]


def latest_step(workdir: epath.PathLike) -> int | None:
  """Find the newest committed step of a run."""
  # From the newest on, of which hardly any is not whole: the others are not asked for.
  return next((int(each.name) for each in reversed(all_steps(folder(workdir))) if is_committed(each)), None)


def metrics_of(path: epath.Path, step: int) -> dict[str, float]:
  """Read what was measured when this checkpoint was saved; empty where nothing was.

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
  for run in buckets.absolute(parent).iterdir() if is_pattern else [parent]:
    checkpoints = folder(run)
    sys.stdout.writelines(f"{checkpoints / str(step) / COMMIT_MARK}\n" for step in committed_steps(checkpoints))
