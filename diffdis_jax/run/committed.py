"""Which checkpoints of a run there are. Without Orbax, whose import takes seconds.

As a command, `python -m diffdis_jax.run.committed WORKDIR` writes the commit mark of each, a line each; where WORKDIR
ends in `/*`, of all runs in that folder.
"""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError, parse_json

COMMIT_MARK = "commit_success.txt"
AT_ONCE = 32  # checkpoints that are looked at
_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")
METRICS = "metrics/metrics"  # in a checkpoint's folder, where Orbax writes and reads them


def folder(workdir: epath.PathLike) -> epath.Path:
  """Of a run's checkpoints."""
  return buckets.absolute(workdir) / "checkpoints"


def all_steps(path: epath.Path) -> list[epath.Path]:
  """The checkpoints in that folder, whole or not, by step."""
  paths = [each for each in path.iterdir() if each.name.isdigit()] if path.is_dir() else []
  return sorted(paths, key=lambda each: int(each.name))


def is_committed(path: epath.Path) -> bool:
  """Whether a checkpoint's own folder is that of a whole one."""
  return (path / COMMIT_MARK).exists()


def of_each(look: Callable[[_Asked], _Answer], checkpoints: Iterable[_Asked]) -> list[_Answer]:
  """What is found of each, in their order. Many at a time: a long run has a thousand, and a bucket takes tens of
  milliseconds for each."""
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE, thread_name_prefix="checkpoints") as pool:
    return [*pool.map(look, checkpoints)]


def committed_steps(path: epath.Path) -> list[int]:
  """Steps of the whole ones in that folder."""
  paths = all_steps(path)
  return [int(each.name) for each, whole in zip(paths, of_each(is_committed, paths), strict=True) if whole]


def latest_step(workdir: epath.PathLike) -> int | None:
  """The newest committed step of a run, or None."""
  # From the newest on, of which hardly any is not whole: the others are not asked for.
  return next((int(each.name) for each in reversed(all_steps(folder(workdir))) if is_committed(each)), None)


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
