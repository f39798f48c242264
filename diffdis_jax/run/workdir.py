"""The folder of a run: its config.json, and whether a run may resume there under the present config."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from diffdis_jax.common import buckets, guesses
from diffdis_jax.common.files import sweep, write_whole
from diffdis_jax.config import SECTIONS, as_text, read_json_object
from diffdis_jax.config.section import normalise
from diffdis_jax.errors import FULL_DISK, UserError, may_pass
from diffdis_jax.run import committed

MAY_CHANGE = (
  r"^(log|save|eval|sample)_every$",
  r"^(train_evals|sample_prompts|inference)(\.|$)",
  r"^(checkpoint|evals|mesh)(\.|$)",
  r"^data\.loader\.(num_threads|prefetch)$",
  r"^optim\.allow_uninitialized$",  # of the start alone
  r"^optim\.skip_",  # of steps without which the run would have ended
)
"""Fields, by their dotted paths, that may differ when a run resumes: they do not change the numbers of the training."""
# Fields that differ in a run that is longer, or whose data have moved.
_OF_NO_NUMBER = r"^num_steps$|^data\.(mixture\.[^.]+\.)?path$"
REPORTS = ("metrics.jsonl", "history.jsonl", "trackers.json", "events.out.tfevents.*", "samples", "plugins")


def open_for_training(
  workdir: epath.PathLike, config: Mapping[str, Any], *, is_writer: bool = True, moved: Collection[str] = ()
) -> epath.Path:
  """Create the folder and write its config.json, or check that the run in it has the same config.

  The reports of a run without a checkpoint are set aside when its config is replaced.

  Args:
    workdir: the folder, local or in a bucket.
    config: nested dicts.
    is_writer: whether this process writes; one of several processes does.
    moved: as for `check_config`.

  Raises:
    UserError: the folder cannot be made, or holds a run of another config.
    OSError: its storage is away, or its disk is full.
  """
  path = buckets.path(workdir)
  replaced = check_config(workdir, config, moved=moved)
  if not is_writer:
    return path
  with writing(workdir):
    path.mkdir(parents=True, exist_ok=True)
    if not buckets.is_url(path):
      sweep(path)
      sweep(path / "samples")
    if replaced:
      message = "the config of a run without a checkpoint is replaced: %s; its reports are now in %s"
      logging.warning(message, ", ".join(replaced), _set_aside(path))
    write_whole(path / "config.json", as_text(config).encode())
  return path


@contextlib.contextmanager
def writing(workdir: epath.PathLike) -> Iterator[None]:
  """Raise UserError for an OSError within, but not for a full disk or for storage that is away, which may change."""
  try:
    yield
  except OSError as error:
    if may_pass(error) or error.errno in FULL_DISK:
      raise
    raise UserError(f"cannot write to --workdir={workdir}: {error.strerror or error}") from error


def check_config(workdir: epath.PathLike, config: Mapping[str, Any], *, moved: Collection[str] = ()) -> list[str]:
  """Check that a run may resume in this folder under this config. A larger `num_steps` makes the run longer.

  Args:
    workdir: the folder.
    config: nested dicts.
    moved: fields that may differ too, such as the path of data that were copied.

  Returns:
    What differs outside of MAY_CHANGE, a phrase for each field, if the run there has no checkpoint.

  Raises:
    UserError: the configs differ and the run there has a checkpoint, or config.json is of no training run.
  """
  path = buckets.path(workdir)
  if not (path / "config.json").exists():
    return []
  config_there = read_json_object(path)
  there, here = flatten(config_there), flatten(config)
  may_be_replaced = SECTIONS <= config_there.keys() and committed.latest_step(workdir) is None
  ignored = {*moved} if lengthened(workdir, config) is None else {*moved, "num_steps"}
  differing = differences(*({name: each[name] for name in each.keys() - ignored} for each in (there, here)))
  if differing and not may_be_replaced:
    raise UserError(f"{path} holds a run of another config: {', '.join(differing)}; take its config or a new --workdir")
  return differing


def lengthened(workdir: epath.PathLike, config: Mapping[str, Any]) -> int | None:
  """Return the `num_steps` of the run there, if it has a checkpoint and this config makes it longer; else None."""
  path = buckets.path(workdir)
  if not (path / "config.json").exists() or committed.latest_step(workdir) is None:
    return None
  before, after = read_json_object(path).get("num_steps"), config.get("num_steps")
  return before if isinstance(before, int) and isinstance(after, int) and before < after else None


def _set_aside(path: epath.Path) -> epath.Path:
  """Move what a run has written beside checkpoints into a new folder. The next run is another one for a tracker."""
  aside = next(each for n in itertools.count(1) if not (each := path / f"replaced_{n}").exists())
  aside.mkdir()
  (path / "config.json").copy(aside / "config.json")
  for pattern in REPORTS:
    for file in path.glob(pattern):
      file.rename(aside / file.name)
  return aside


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """List the fields of a config by their dotted paths, lists as tuples. A section without fields stands for itself."""
  return guesses.fields_of(normalise(config))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """Name each field outside of MAY_CHANGE in which two configs differ; both as from `flatten`."""
  shown = lambda fields, field: repr(fields[field]) if field in fields else "absent"
  return [
    f"{field} is {shown(there, field)} there and {shown(here, field)} here"
    for field in sorted(there.keys() | here.keys())
    if (field in there, there.get(field)) != (field in here, here.get(field)) and not may_change(field)
  ]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """Choose the fields on which the numbers of a training depend, those outside of MAY_CHANGE, by their dotted paths."""
  return {field: value for field, value in flatten(config).items() if not may_change(field)}


def digest(fields: Mapping[str, Any]) -> str:
  """Return eight hexadecimal digits of the SHA-256 of the fields as JSON, sorted."""
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def may_change(field: str) -> bool:
  """Return whether a field, by its dotted path, leaves the numbers of a training alone."""
  return any(re.search(pattern, field) for pattern in MAY_CHANGE)


def run_digest(workdir: epath.PathLike) -> str:
  """Give the digest of a run's config by which its checkpoints know it; empty where there is no config.json.

  It covers what the numbers of the training depend on, except its length and where its data lie.

  Raises:
    UserError: config.json is damaged.
  """
  path = buckets.path(workdir)
  if not (path / "config.json").exists():
    return ""
  fields = identity(read_json_object(path))
  return digest({name: value for name, value in fields.items() if not re.search(_OF_NO_NUMBER, name)})
