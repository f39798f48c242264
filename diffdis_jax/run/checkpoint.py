"""Saves a run's Orbax checkpoints: `<workdir>/checkpoints/<step>/{params,ema,opt_state,teacher,data,meta}`.

A checkpoint counts once it holds Orbax's commit mark, its last file to be written; before it come the digests of the
others, see digests.py. Training saves and resumes through `Checkpointer`; what only reads is in restore.py.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from grain import checkpoint as grain_checkpoint
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from diffdis_jax.common import buckets, files, storage
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.errors import FULL_DISK, Diverged, Preempted, UserError, full_disk
from diffdis_jax.parallel import processes
from diffdis_jax.run import committed, digests, restore, workdir
from diffdis_jax.run.restore import Restored
from diffdis_jax.structs import TrainState

SAVE_TIMEOUT = 1200  # seconds after which a save in the background has failed


class Checkpointer:
  """Saves a run in the background, and resumes it. One per training run: it clears away interrupted saves.

  A context manager: on the way out it finishes the save in progress.

  Args:
    run: its folder, whose config.json is there already.
    kept: which checkpoints stay.
  """

  def __init__(self, run: epath.PathLike, kept: CheckpointPolicy | None = None) -> None:
    self._run, self._kept, self._folder = run, kept or CheckpointPolicy(), committed.folder(run)
    self._digest = workdir.run_digest(run)
    self._saving = -1  # the step whose save is in progress
    # Before Orbax lists the folder: it would trust step folders without a mark, and delete by damaged metrics.
    processes.on_first(self._prepare_folder)
    self._manager = self._open_manager()

  def _prepare_folder(self) -> None:
    _check_names(self._folder)
    _set_aside_uncommitted(self._folder)
    if self._kept.keep_best:
      _check_metrics(self._folder, self._digest)

  def _open_manager(self) -> ocp.CheckpointManager:
    kept = self._kept
    # A checkpoint stays if any rule keeps it.
    rules: list[Any] = [policies.LatestN(kept.keep_last)]
    if kept.keep_every:
      rules.append(policies.EveryNSteps(kept.keep_every))
    rank = functools.partial(_rank, name=kept.best_metric, sign=1 if kept.best_is == "max" else -1)
    if kept.keep_best:
      # Else a checkpoint that was never measured, such as that of an interruption, would stay forever.
      rules.append(policies.BestN(get_metric_fn=rank, n=kept.keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(rules),
      cleanup_tmp_directories=True,
      best_fn=rank if kept.keep_best else None,
      # In the background too, on process 0, when every process has written its files, before the commit mark.
      async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT, post_finalization_callback=self._write_digests),
    )
    try:
      return ocp.CheckpointManager(self._folder, options=options)
    except (ValueError, TypeError, RecursionError) as error:
      what = f"a _CHECKPOINT_METADATA in {self._folder} is damaged: {str(error)[:80]}"
      raise UserError(f"{what}; remove that file, which nothing needs") from error

  def latest_step(self) -> int | None:
    """Find the newest committed step, as process 0 sees it; None before the first."""
    # Not the manager's list, which may hold a save that has only begun. And one process decides for all, since a shared
    # file system may show a new folder to some of them later.
    step = storage.patiently(lambda: committed.latest_step(self._run), f"{self._run}")
    found = int(processes.from_first(np.int32(-1 if step is None else step)))
    return None if found < 0 else found

  def save(
    self,
    step: int,
    state: TrainState,
    data_iterator: Any = None,
    *,
    meta: dict[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    required: bool = True,
  ) -> bool:
    """Start a save; return as soon as the arrays may be donated. Returns False if this step is saved already.

    A disk that is full, or was when the save before was written, is one line of the log, and False.

    Args:
      step: number of finished steps; larger than that of any earlier save.
      state: its arrays are copied before this returns.
      data_iterator: Grain iterator whose next batch is the first one not trained on.
      meta: a few JSON values to keep beside them.
      metrics: of evaluations at this step, the same on every process; without them it is not among the best.
      required: whether no later save will do, so that a full disk is an error.

    Raises:
      OSError: it cannot be written.
    """
    # A save at an interruption may fall on a step that `save_every` has saved.
    if step in self._manager.all_steps():
      return False
    try:
      self.wait()  # as the manager's own `save` begins
    except OSError as error:  # of the save before, whose place this one takes
      self._give_up(error, required=False)
    trees = {name: getattr(state, name) for name in restore.STORED}
    # One process has nobody to share the writing with.
    if jax.process_count() == 1:
      trees = jax.tree.map(_on_one_device, trees)
    # Orbax stores no empty tree; reading knows, and takes what it is asked for as its value.
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
    if data_iterator is not None:
      items["data"] = grain_checkpoint.CheckpointSave(data_iterator)
    items["meta"] = ocp.args.JsonSave({"step": step, **(meta or {})})
    self._saving = step
    try:
      if not has_room(self._folder, sum(array.nbytes for array in jax.tree.leaves(trees))):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self._run))
      # `force`: the caller has decided that it is time to save.
      with _os_errors():
        return self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None, force=True)
    except OSError as error:
      self._give_up(error, required=required)
      return False

  def _give_up(self, error: OSError, *, required: bool) -> None:
    """Say in one line that a disk is full. Raises the error, if it is another or no later save will do."""
    # Several processes would have to agree.
    if required or error.errno not in FULL_DISK or jax.process_count() > 1:
      raise error
    said = "no room to save step %d; the last checkpoint is %s; the next save tries again"
    logging.warning(said, self._saving, self.latest_step())
    # A new manager, which removes what the failed save has left: the old one raises that error for ever.
    with contextlib.suppress(Exception):
      self._manager.close()
    self._manager = self._open_manager()

  def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """Add what `save` takes as `metrics` to the newest checkpoint, whose evaluation was interrupted and is done again.

    Every process makes the call, while no save is in progress. Raises OSError: it cannot be written.
    """
    if not (metrics and self._kept.keep_best):
      return

    def write() -> None:
      path = self._folder / str(step)
      file, together = path / committed.METRICS, {**committed.metrics_of(self._folder, step), **metrics}
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(file, json.dumps(together).encode())
      digests.renew(path, [committed.METRICS])

    processes.on_first(write)
    self.close()
    self._manager = self._open_manager()  # which reads them

  def restore(self, step: int, abstract: TrainState, data_iterator: Any = None) -> Restored:
    """Read a checkpoint onto the devices that `abstract` asks for, and set the data iterator to it.

    Args:
      step: a committed step.
      abstract: ShapeDtypeStructs with shardings; these need not be those of the run that saved.
      data_iterator: a Grain iterator built as the saved one was.

    Raises:
      UserError: no such checkpoint, or one that is damaged, of another run, or does not fit `abstract`.
    """
    return restore.read_state(self._run, step, abstract, data_iterator)

  def _write_digests(self) -> None:
    # On a disk it still has another name, by which it is no checkpoint.
    unfinished = f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
    names = [path.name for path in self._folder.iterdir() if path.name.startswith(unfinished)]
    written = self._folder / (names[0] if names else str(self._saving))
    digests.write(written, step=self._saving, run=self._digest)

  def wait(self) -> None:
    """Return when the save in progress is committed. Raises what went wrong with it."""
    with _os_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait, and free the background threads."""
    with _os_errors():
      self._manager.close()

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # A UserError, such as a loss that is not finite, reaches every process; after a bug in one process the others
    # will not reach the barrier at which `close` waits for them.
    if kind is None or issubclass(kind, (UserError, Preempted, Diverged)) or jax.process_count() == 1:
      self.close()


class Best(NamedTuple):
  """The checkpoint that was saved with the best value of a metric."""

  step: int
  value: float


def best(run: epath.PathLike, kept: CheckpointPolicy) -> Best | None:
  """Find the best checkpoint by `kept.best_metric`; the earliest of equals, None where none was measured by it."""
  folder, found = committed.folder(run), []

  def measured(step: int) -> dict[str, float]:
    # A damaged file of figures hides one candidate, and must not keep the others from being found.
    try:
      return committed.metrics_of(folder, step)
    except (OSError, UserError) as error:
      logging.warning("what checkpoint %d was measured at cannot be read: %s", step, error)
      return {}

  steps = committed.committed_steps(folder) if kept.best_metric else []
  for step, metrics in zip(steps, committed.of_each(measured, steps), strict=True):
    if not math.isnan(metrics.get(kept.best_metric, math.nan)):
      found.append(Best(step, float(metrics[kept.best_metric])))
  # The steps come in order, and `max` keeps the first of equals.
  sign = 1 if kept.best_is == "max" else -1
  return max(found, key=lambda each: sign * each.value, default=None)


def _check_names(folder: epath.Path) -> None:
  """Raise UserError for a folder that Orbax takes for a checkpoint, though none has such a name."""
  steps = {path.name for path in committed.all_steps(folder)}
  for path in folder.iterdir() if folder.is_dir() else ():
    if path.name.isdigit() and path.name not in steps:
      raise UserError(f"{path} is no checkpoint: its name is no step; move it elsewhere")


def _set_aside_uncommitted(folder: epath.Path) -> None:
  """Rename step folders without a commit mark: Orbax would trust them, and refuse to save that step again.

  In a bucket, where every save writes under its own name, they are what a killed one leaves, and cannot be renamed at
  once: there they are removed.
  """
  paths = committed.all_steps(folder)
  for path, whole in zip(paths, committed.of_each(committed.is_committed, paths), strict=True):
    if whole:
      continue
    if buckets.is_url(path):
      logging.warning("checkpoint %s has no %s: its save was interrupted; removing it", path, committed.COMMIT_MARK)
      path.rmtree()
    else:
      aside = path.with_name(f"{path.name}.uncommitted")
      logging.warning("checkpoint %s has no %s and is ignored; it is now %s", path, committed.COMMIT_MARK, aside.name)
      if aside.exists():  # of an earlier interruption at this step
        aside.rmtree()
      path.rename(aside)


def _check_metrics(folder: epath.Path, run: str) -> None:
  """Raise UserError where a checkpoint's metrics, by which the best ones are kept, are not as they were saved."""
  steps = committed.committed_steps(folder)
  found = committed.of_each(lambda step: digests.damage_of_step(folder / str(step), run, ("metrics",)), steps)
  for step, damage in zip(steps, found, strict=True):
    if damage is not None:
      what = f"{damage.file} {damage.what}; move its folder elsewhere"
      raise UserError(f"checkpoint {folder / str(step)} cannot be read: {what}")


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
  """Make OSError of what TensorStore raises for a full disk, or where a quota is used up."""
  try:
    yield
  except ValueError as error:
    if (number := full_disk(error)) is None:
      raise
    raise OSError(number, os.strerror(number)) from error


def has_room(folder: epath.Path, size: int) -> bool:
  """Tell whether a disk has room for a checkpoint of `size` bytes, as process 0 sees it.

  Orbax's compression saves a few per cent alone, and a save that finds the disk full prints hundreds of lines.
  """
  if buckets.is_url(folder):
    return True
  found = shutil.disk_usage(folder).free > size if processes.is_first() else True
  return bool(processes.from_first(np.int32(found)))


def _on_one_device(array: Any) -> Any:
  """Give a replicated array as one of its devices holds it.

  Else Orbax has every device write a slice, to share the work among hosts, and compiles the slicing for each shape.
  """
  return array.addressable_data(0) if isinstance(array, jax.Array) and array.is_fully_replicated else array


def _rank(metrics: Mapping[str, float], *, name: str, sign: int) -> float:
  # NaN too is the least: Orbax sorts by this, and sorts nothing that has a NaN in it.
  value = metrics.get(name, math.nan)
  return -math.inf if math.isnan(value) else sign * value
