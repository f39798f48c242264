"""Saves a run's Orbax checkpoints: `<workdir>/checkpoints/<step>/{params,ema,opt_state,teacher,data,meta}`.

A checkpoint counts once it holds Orbax's commit mark, its last file to be written; before it come the digests of the
others, see digests.py. Each is whole by itself, frozen parameters too (0.83 of 15.45 GiB at full size): written once
for all, one damaged file would take every checkpoint of the run. Training saves and resumes through `Checkpointer`;
what only reads is in restore.py.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
from diffdis_jax.errors import FULL_DISK, Preempted, UserError, full_disk
from diffdis_jax.parallel import processes
from diffdis_jax.run import committed, digests, restore
from diffdis_jax.run.restore import Restored
from diffdis_jax.structs import TrainState

SAVE_TIMEOUT = 1200  # seconds after which a save in the background has failed


class Checkpointer:
  """Saves a run in the background, and resumes it. One per training run: it clears away interrupted saves.

  A context manager: on the way out it finishes the save in progress.

  Args:
    workdir: folder of the run.
    kept: which checkpoints stay.
  """

  def __init__(self, workdir: epath.PathLike, kept: CheckpointPolicy | None = None) -> None:
    kept = kept or CheckpointPolicy()
    self._workdir = workdir
    self._saving = -1  # the step whose save is in progress
    # Before the manager lists the folder: it would trust step folders without a mark. The barrier keeps the other
    # processes from listing it meanwhile, so that all of them know the same steps.
    if processes.is_first():
      _set_aside_uncommitted(committed.folder(workdir))
    processes.barrier("uncommitted checkpoints are set aside")
    if kept.keep_best:
      # Before Orbax reads them, and deletes those that are not best.
      processes.on_first(lambda: restore.check_metrics(committed.folder(workdir)))
    self._kept = kept
    self._manager = self._open_manager()

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
    return ocp.CheckpointManager(
      committed.folder(self._workdir),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(rules),
        cleanup_tmp_directories=True,
        best_fn=rank if kept.keep_best else None,
        # In the background too, on process 0, when every process has written its files.
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT, post_finalization_callback=self._write_digests),
      ),
    )

  def latest_step(self) -> int | None:
    """The newest committed step, or None before the first; as process 0 sees it."""
    # Not the manager's list, which may hold a save that has only begun. And one process decides for all, since a shared
    # file system may show a new folder to some of them later.
    step = storage.patiently(lambda: committed.latest_step(self._workdir), f"{self._workdir}")
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
    """Starts a save; returns as soon as the arrays may be donated. Returns False if this step is saved already.

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
    trees = {name: getattr(state, name) for name in restore.STORED}
    # One process has nobody to share the writing with.
    if jax.process_count() == 1:
      trees = jax.tree.map(_on_one_device, trees)
    # Orbax stores no empty tree; reading knows, and takes what it is asked for as its value.
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
    if data_iterator is not None:
      items["data"] = grain_checkpoint.CheckpointSave(data_iterator)
    items["meta"] = ocp.args.JsonSave({"step": step, **(meta or {})})
    if not self._is_ready(step, jax.tree.leaves(trees), required=required):
      return False
    self._saving = step
    try:
      # `force`: the caller has decided that it is time to save.
      with _os_errors():
        return self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None, force=True)
    except OSError as error:
      self._give_up(error, required=required)
      return False

  def _is_ready(self, step: int, arrays: Sequence[Any], *, required: bool) -> bool:
    """When the save before is written: whether there is room for this one, as far as can be told."""
    try:
      self.wait()  # as the manager's own `save` begins: the digests of the one before are written
    except OSError as error:
      self._give_up(error, required=False)  # the one before, whose place this one takes
    if has_room(committed.folder(self._workdir), arrays):
      return True
    if required:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self._workdir))
    self._say_full(step)
    return False

  def _give_up(self, error: OSError, *, required: bool) -> None:
    """The save that has found a full disk. Raises the error, if it is another or no later save will do."""
    # Several processes would have to agree.
    if required or error.errno not in FULL_DISK or jax.process_count() > 1:
      raise error
    self._say_full(self._saving)
    # A new manager, which removes what the failed save has left: the old one raises that error for ever.
    with contextlib.suppress(Exception):
      self._manager.close()
    self._manager = self._open_manager()

  def _say_full(self, step: int) -> None:
    said = "no room to save step %d; the last checkpoint is %s; the next save tries again"
    logging.warning(said, step, self.latest_step())

  def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """What `save` takes as `metrics`, of the newest step, whose evaluation was interrupted, and done again after the
    save. Every process makes the call, while no save is in progress.

    Raises:
      OSError: it cannot be written.
    """
    # As process 0 sees it, so that all of them meet below.
    if not (metrics and self._kept.keep_best) or step != self.latest_step():
      return
    if processes.is_first():
      folder = committed.folder(self._workdir)
      file, together = folder / str(step) / committed.METRICS, {**committed.metrics_of(folder, step), **metrics}
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(file, json.dumps(together).encode())
      digests.renew(folder / str(step), [committed.METRICS])
    processes.barrier("the metrics of a checkpoint are added")
    self.close()
    self._manager = self._open_manager()  # which reads them

  def restore(self, step: int, abstract: TrainState, data_iterator: Any = None) -> Restored:
    """Reads a checkpoint onto the devices that `abstract` asks for, and sets the data iterator to it.

    Args:
      step: a committed step.
      abstract: ShapeDtypeStructs with shardings; these need not be those of the run that saved.
      data_iterator: a Grain iterator built as the saved one was.

    Raises:
      UserError: no such checkpoint, or one that is damaged or does not fit `abstract`.
    """
    return restore.read_state(restore.find_shown(self._workdir, step), abstract, data_iterator)

  def _write_digests(self) -> None:
    """Called by Orbax before it writes the commit mark."""
    folder = committed.folder(self._workdir)
    # On a disk it still has another name, by which it is no checkpoint.
    unfinished = f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
    names = [path.name for path in folder.iterdir() if path.name.startswith(unfinished)]
    digests.write(folder / (names[0] if names else str(self._saving)))

  def wait(self) -> None:
    """Returns when the save in progress is committed. Raises what went wrong with it."""
    with _os_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the background threads."""
    with _os_errors():
      self._manager.close()

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # A UserError, such as a loss that is not finite, reaches every process; after a bug in one process the others
    # will not reach the barrier at which `close` waits for them.
    if kind is None or issubclass(kind, (UserError, Preempted)) or jax.process_count() == 1:
      self.close()


class Best(NamedTuple):
  """The checkpoint that was saved with the best value of a metric."""

  step: int
  value: float


def best(workdir: epath.PathLike, kept: CheckpointPolicy) -> Best | None:
  """By `kept.best_metric`, among the checkpoints that are there; the earliest of equals. None where none has it."""
  folder, found = committed.folder(workdir), []

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


def _set_aside_uncommitted(folder: epath.Path) -> None:
  """Renames step folders without a commit mark: Orbax would trust them, and refuse to save that step again.

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


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
  """Makes OSError of what TensorStore raises for a full disk, or where a quota is used up."""
  try:
    yield
  except ValueError as error:
    if (number := full_disk(error)) is None:
      raise
    raise OSError(number, os.strerror(number)) from error


def has_room(folder: epath.Path, arrays: Sequence[Any]) -> bool:
  """Whether a disk has room for a checkpoint, as process 0 sees it. Orbax's compression saves a few per cent alone.

  Asked before, since a save that finds the disk full prints hundreds of lines of its own.
  """
  if buckets.is_url(folder):
    return True
  needed = sum(array.nbytes for array in arrays)
  found = shutil.disk_usage(folder).free > needed if processes.is_first() else True
  return bool(processes.from_first(np.int32(found)))


def _on_one_device(array: Any) -> Any:
  """A replicated array as one of its devices holds it. Else Orbax has every device write a slice, to share the work
  among hosts, and compiles the slicing for each shape."""
  return array.addressable_data(0) if isinstance(array, jax.Array) and array.is_fully_replicated else array


def _rank(metrics: Mapping[str, float], *, name: str, sign: int) -> float:
  # NaN too is the least: Orbax sorts by this, and sorts nothing that has a NaN in it.
  value = metrics.get(name, math.nan)
  return -math.inf if math.isnan(value) else sign * value
