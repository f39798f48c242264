"""The folder of a run: its config.json, the check whether a run may resume there, and its checkpoints.

The command `python -m diffdis_jax.run.workdir WORKDIR` prints the path of the commit mark of each checkpoint;
if WORKDIR ends in `/*`, those of all runs in that folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from absl import logging
from etils import epath

from diffdis_jax.common import buckets, files, guesses
from diffdis_jax.config import SECTIONS, as_text, read_json_object
from diffdis_jax.config.section import normalise
from diffdis_jax.errors import UserError, parse_json
from diffdis_jax.run import digests
from diffdis_jax.run.digests import COMMIT_MARK

MAY_CHANGE = (
  r"^(log|save|eval|sample)_every$",
  r"^(train_evals|sample_prompts|inference)(\.|$)",
  r"^(checkpoint|evals|mesh)(\.|$)",
  r"^data\.loader\.(num_threads|prefetch)$",
  r"^optim\.allow_uninitialized$",  # only used at the start
  r"^optim\.skip_",  # only affects steps at which the run would otherwise have ended
)
"""Dotted paths of the fields that may differ when a run resumes: they do not change the numbers of the training."""
# Fields that may differ in a longer run, or after the data have moved.
_OF_NO_NUMBER = r"^num_steps$|^data\.(mixture\.[^.]+\.)?path$"
_METRICS = "metrics/metrics"  # Orbax's file of metrics in a checkpoint's folder
_STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # the form that Orbax writes; `isdigit` also accepts ²


def open_for_training(
  workdir: epath.PathLike, config: Mapping[str, Any], *, is_writer: bool = True, moved: Collection[str] = ()
) -> epath.Path:
  """Create the folder and write its config.json, if this process `is_writer`, or check by `check_config` that the run
  in it has the same config.

  Raises:
    UserError: the folder cannot be created, or holds a run of another config.
    OSError: its storage is unreachable, or its disk is full.
  """
  path = buckets.path(workdir)
  replaced = check_config(workdir, config, moved=moved)
  if is_writer:
    with files.writing(f"to --workdir={workdir}"):
      path.mkdir(parents=True, exist_ok=True)
      if replaced:
        logging.warning("the config of a run without a checkpoint is replaced: %s", ", ".join(replaced))
      files.write_whole(path / "config.json", as_text(config).encode())
  return path


def check_config(workdir: epath.PathLike, config: Mapping[str, Any], *, moved: Collection[str] = ()) -> list[str]:
  """Check that a run may resume in this folder with this config. A larger `num_steps` makes the run longer.

  The fields in `moved`, such as the path of data that were copied, may also differ. If the run there has no checkpoint,
  return the other differences, a phrase for each field.

  Raises:
    UserError: the configs differ and the run there has a checkpoint, or config.json is not that of a training run.
  """
  path = buckets.path(workdir)
  if not (path / "config.json").exists():
    return []
  config_there = read_json_object(path)
  may_differ = {*moved} if lengthened(workdir, config) is None else {*moved, "num_steps"}
  there, here = (
    {field: value for field, value in identity(fields).items() if field not in may_differ}
    for fields in (config_there, config)
  )
  differing = differences(there, here)
  if differing and not (SECTIONS <= config_there.keys() and latest_step(workdir) is None):
    raise UserError(f"{path} holds a run of another config: {', '.join(differing)}; take its config or a new --workdir")
  return differing


def lengthened(workdir: epath.PathLike, config: Mapping[str, Any]) -> int | None:
  """Return the `num_steps` of the run there, if it has a checkpoint and this config makes it longer; else None."""
  path = buckets.path(workdir)
  if not (path / "config.json").exists() or latest_step(workdir) is None:
    return None
  before, after = read_json_object(path).get("num_steps"), config.get("num_steps")
  return before if isinstance(before, int) and isinstance(after, int) and before < after else None


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a config by their dotted paths, lists as tuples. A section without fields is an entry."""
  return guesses.fields_of(normalise(config))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """Describe each field in which two configs, both from `identity`, differ."""
  shown = lambda fields, field: repr(fields[field]) if field in fields else "absent"
  return [
    f"{field} is {shown(there, field)} there and {shown(here, field)} here"
    for field in sorted(there.keys() | here.keys())
    if (field in there, there.get(field)) != (field in here, here.get(field))
  ]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields that affect the numbers of a training, those outside of MAY_CHANGE, by their dotted paths."""
  return {field: value for field, value in flatten(config).items() if not re.search("|".join(MAY_CHANGE), field)}


def digest(fields: Mapping[str, Any]) -> str:
  """Return eight hexadecimal digits of the SHA-256 of the fields as JSON, sorted."""
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def run_digest(workdir: epath.PathLike) -> str:
  """Return the digest of a run's config, which its checkpoints also have; empty without a config.json.

  It covers the fields that affect the numbers of the training, except its length and the paths of its data. Raises
  UserError: config.json is damaged.
  """
  if not ((path := buckets.path(workdir)) / "config.json").exists():
    return ""
  fields = identity(read_json_object(path))
  return digest({name: value for name, value in fields.items() if not re.search(_OF_NO_NUMBER, name)})


def checkpoints(workdir: epath.PathLike) -> epath.Path:
  """Return the folder of a run's checkpoints."""
  return buckets.absolute(workdir) / "checkpoints"


def all_steps(path: epath.Path) -> list[epath.Path]:
  """List the checkpoints in a folder, complete or not, by step."""
  paths = [child for child in path.iterdir() if _STEP.fullmatch(child.name)] if path.is_dir() else []
  return sorted(paths, key=lambda child: int(child.name))


def is_committed(path: epath.Path) -> bool:
  """Return whether the checkpoint in this folder is complete."""
  return (path / COMMIT_MARK).exists()


def committed_steps(path: epath.Path) -> list[int]:
  """List the steps of the complete checkpoints in a folder."""
  return [int(step.name) for step in all_steps(path) if is_committed(step)]


def latest_step(workdir: epath.PathLike) -> int | None:
  """Return the newest committed step of a run."""
  # Begin with the newest, which is nearly always complete, so that the others are not looked up.
  return next((int(step.name) for step in reversed(all_steps(checkpoints(workdir))) if is_committed(step)), None)


def newest_whole(path: epath.Path, run: str, *, before: float = math.inf) -> int | None:
  """Return the newest step below `before` in a folder all of whose files are as this run saved them."""
  steps = (step for step in reversed(committed_steps(path)) if step < before)
  return next((step for step in steps if digests.damage_of_step(path / str(step), run) is None), None)


def metrics_of(path: epath.Path, step: int) -> dict[str, float]:
  """Read the metrics that were saved with this checkpoint; empty if there are none. Raises OSError, or UserError if
  they are damaged."""
  file = path / str(step) / _METRICS
  metrics = parse_json(file.read_bytes(), str(file)) if file.exists() else {}
  if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
    raise UserError(f"{file} should hold a number for each metric")
  return metrics


if __name__ == "__main__":
  parent, is_pattern, _ = sys.argv[1].partition("/*")
  for run in buckets.absolute(parent).iterdir() if is_pattern else [parent]:
    folder = checkpoints(run)
    sys.stdout.writelines(f"{folder / str(step) / COMMIT_MARK}\n" for step in committed_steps(folder))
