"""Save a run's Orbax checkpoints, `<workdir>/checkpoints/<step>/{params,ema,opt_state,teacher,data,meta}`.

A checkpoint counts once it has Orbax's commit mark, which is written last, after the digests of the other files
(digests.py). Training saves and resumes by `Checkpointer`; restore.py has the functions that only read.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from grain import checkpoint as grain_checkpoint
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from diffdis_jax.common import buckets, storage
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.errors import Diverged, Preempted, UserError
from diffdis_jax.parallel import processes
from diffdis_jax.run import digests, restore, workdir
from diffdis_jax.structs import TrainState

SAVE_TIMEOUT = 1200  # seconds after which a background save counts as failed


class Checkpointer:
  """Save a run in the background. Its folder `run` has a config.json. `kept` says which checkpoints are kept.

  A training run has only one, since it removes interrupted saves. It is a context manager, which finishes the save in
  progress at its end.
  """

  def __init__(self, run: epath.PathLike, kept: CheckpointPolicy | None = None) -> None:
    self.run, self._kept, self._folder = run, kept or CheckpointPolicy(), workdir.checkpoints(run)
    self._digest = workdir.run_digest(run)
    self._saving = -1  # the step whose save is in progress
    # Done before Orbax lists the folder: it would trust step folders without a mark, and delete by damaged metrics.
    processes.on_first(self._prepare_folder)
    self._manager = self._open_manager()

  def _prepare_folder(self) -> None:
    """Remove the folder of an interrupted save in a bucket, which Orbax would trust and could not write again.

    On a disk, an interrupted save has another name, so that such a folder may be an unfinished copy: it is renamed.
    """
    for path in workdir.all_steps(self._folder):
      if workdir.is_committed(path):
        # Otherwise Orbax would choose checkpoints to delete by damaged metrics.
        if self._kept.keep_best and (damage := digests.damage_of_step(path, self._digest, ("metrics",))):
          raise UserError(f"checkpoint {path} cannot be read: {damage.file} {damage.what}; move its folder elsewhere")
        continue
      logging.warning("checkpoint %s has no %s and is ignored", path, digests.COMMIT_MARK)
      aside = path if buckets.is_url(path) else path.with_name(f"{path.name}.uncommitted")
      if aside.exists():
        aside.rmtree()
      if aside != path:
        path.rename(aside)

  def _open_manager(self) -> ocp.CheckpointManager:
    kept = self._kept
    # A checkpoint stays if any rule keeps it.
    rules: list[Any] = [policies.LatestN(kept.keep_last)]
    if kept.keep_every:
      rules.append(policies.EveryNSteps(kept.keep_every))
    rank = functools.partial(_rank, kept=kept)
    if kept.keep_best:
      # Otherwise checkpoints without metrics, such as those of interruptions, would never be deleted.
      rules.append(policies.BestN(get_metric_fn=rank, n=kept.keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(rules),
      cleanup_tmp_directories=True,
      best_fn=rank if kept.keep_best else None,
      # The callback also runs in the background, on process 0, after all files and before the commit mark.
      async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT, post_finalization_callback=self._write_digests),
    )
    try:
      return ocp.CheckpointManager(self._folder, options=options)
    except ValueError as error:
      raise UserError(f"a {digests.ORBAX} in {self._folder} is damaged: {error}; remove that file") from error

  def latest_step(self) -> int | None:
    """Return the newest committed step that process 0 sees, None before the first."""
    # The manager's list may include a save that has only begun. One process decides for all, since a shared file system
    # may show a new folder to some of them later.
    step = storage.patiently(lambda: workdir.latest_step(self.run), f"{self.run}")
    agreed = int(processes.from_first(np.int32(-1 if step is None else step)))
    return None if agreed < 0 else agreed

  def save(
    self,
    step: int,
    state: TrainState,
    data_iterator: Any = None,
    *,
    meta: dict[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Start a save, and return as soon as the arrays may be donated; False if this step is saved already.

    If the save before it has failed, this one replaces it.

    Args:
      step: number of finished steps, larger than in any earlier save.
      state: its arrays are copied before this returns.
      data_iterator: Grain iterator whose next batch is the first that was not trained on.
      meta: a few JSON values that are saved with the arrays.
      metrics: of evaluations at this step, the same on every process. Without them it cannot be among the best.
    """
    # An interruption may save at a step that `save_every` has saved.
    if step in self._manager.all_steps():
      return False
    try:
      self.wait()
    except (OSError, ValueError) as error:  # TensorStore raises ValueError
      if jax.process_count() > 1:  # the others do not know of the error
        raise
      logging.warning("step %d was not saved: %s; trying again at step %d", self._saving, error, step)
      # A new manager removes the files of the failed save; the old one would raise its error again and again.
      with contextlib.suppress(Exception):
        self._manager.close()
      self._manager = self._open_manager()
    trees = {name: getattr(state, name) for name in restore.STORED}
    # A single process does not share the writing.
    if jax.process_count() == 1:
      trees = jax.tree.map(_on_one_device, trees)
    # Orbax stores no empty trees; restore.py takes the requested tree as the value of a missing one.
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
    if data_iterator is not None:
      items["data"] = grain_checkpoint.CheckpointSave(data_iterator)
    items["meta"] = ocp.args.JsonSave({"step": step, **(meta or {})})
    self._saving = step
    # `force`, since the caller decides when to save.
    return self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None, force=True)

  def _write_digests(self) -> None:
    # On a disk, the unfinished checkpoint still has another name.
    unfinished = f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
    names = [path.name for path in self._folder.iterdir() if path.name.startswith(unfinished)]
    written = self._folder / (names[0] if names else str(self._saving))
    digests.write(written, step=self._saving, run=self._digest)

  def wait(self) -> None:
    """Wait until the save in progress is committed. Raises the error of a failed save."""
    self._manager.wait_until_finished()

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # Every process raises a UserError, such as a loss that is not finite. After a bug in one process, the others would
    # not reach the barrier at which this one would wait.
    if kind is None or issubclass(kind, (UserError, Preempted, Diverged)) or jax.process_count() == 1:
      self.wait()
      self._manager.close()


class Best(NamedTuple):
  """The checkpoint with the best value of a metric."""

  step: int
  value: float


def best(run: epath.PathLike, kept: CheckpointPolicy) -> Best | None:
  """Return the best checkpoint by `kept.best_metric`, the earliest of equals; None if none has this metric."""
  folder, by_step = workdir.checkpoints(run), {}
  for step in workdir.committed_steps(folder) if kept.best_metric else ():
    try:
      by_step[step] = workdir.metrics_of(folder, step)
    except (OSError, UserError) as error:  # a run in training may remove it, and others may not be damaged
      logging.warning("what checkpoint %d was measured at cannot be read: %s", step, error)
  # The steps come in order, and `max` keeps the first of equals.
  step = max(by_step, key=lambda step: _rank(by_step[step], kept=kept), default=0)
  value = by_step.get(step, {}).get(kept.best_metric, math.nan)
  return None if math.isnan(value) else Best(step, float(value))


def _on_one_device(array: Any) -> Any:
  """Return the array of a single device from a replicated array.

  Otherwise Orbax lets every device write a slice, to share the work among hosts, and compiles it for each shape.
  """
  return array.addressable_data(0) if isinstance(array, jax.Array) and array.is_fully_replicated else array


def _rank(metrics: Mapping[str, float], *, kept: CheckpointPolicy) -> float:
  # NaN ranks lowest, too: Orbax sorts by this number, and a NaN would break the sorting.
  value = metrics.get(kept.best_metric, math.nan)
  return -math.inf if math.isnan(value) else value if kept.best_is == "max" else -value
