"""Saves a run's Orbax checkpoints: `<workdir>/checkpoints/<step>/{params,ema,opt_state,teacher,data,meta}`.

A checkpoint counts once it holds Orbax's commit mark, its last file to be written; before it come the digests of the
others, see digests.py. Training saves and resumes through `Checkpointer`; what only reads is in restore.py.
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

SAVE_TIMEOUT = 1200  # seconds after which a save in the background has failed


class Checkpointer:
  """Saves a run in the background, of which its folder `run` has the config.json. `kept` says which checkpoints stay.

  One per training run: it clears away interrupted saves. A context manager: on the way out it finishes the save in
  progress.
  """

  def __init__(self, run: epath.PathLike, kept: CheckpointPolicy | None = None) -> None:
    self.run, self._kept, self._folder = run, kept or CheckpointPolicy(), workdir.checkpoints(run)
    self._digest = workdir.run_digest(run)
    self._saving = -1  # the step whose save is in progress
    # Before Orbax lists the folder: it would trust step folders without a mark, and delete by damaged metrics.
    processes.on_first(self._prepare_folder)
    self._manager = self._open_manager()

  def _prepare_folder(self) -> None:
    """Take away what an interrupted save leaves in a bucket, which Orbax would trust, and could not save again.

    On a disk an interrupted save has another name. There such a folder may be a copy that was not finished: it stays
    under another name.
    """
    for path in workdir.all_steps(self._folder):
      if workdir.is_committed(path):
        # Else Orbax would delete by damaged metrics.
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
    except ValueError as error:
      raise UserError(f"a {digests.ORBAX} in {self._folder} is damaged: {error}; remove that file") from error

  def latest_step(self) -> int | None:
    """Find the newest committed step, as process 0 sees it; None before the first."""
    # Not the manager's list, which may hold a save that has only begun. And one process decides for all, since a shared
    # file system may show a new folder to some of them later.
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
    """Start a save; return as soon as the arrays may be donated. Returns False if this step is saved already.

    If the save before it has failed, this one takes its place.

    Args:
      step: number of finished steps; larger than that of any earlier save.
      state: its arrays are copied before this returns.
      data_iterator: Grain iterator whose next batch is the first one not trained on.
      meta: a few JSON values to keep beside them.
      metrics: of evaluations at this step, the same on every process; without them it is not among the best.
    """
    # A save at an interruption may fall on a step that `save_every` has saved.
    if step in self._manager.all_steps():
      return False
    try:
      self.wait()
    except (OSError, ValueError) as error:  # the latter of TensorStore
      if jax.process_count() > 1:  # the others do not know of it
        raise
      logging.warning("step %d was not saved: %s; trying again at step %d", self._saving, error, step)
      # A new manager, which removes what the failed save has left: the old one raises that error for ever.
      with contextlib.suppress(Exception):
        self._manager.close()
      self._manager = self._open_manager()
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
    # `force`: the caller has decided that it is time to save.
    return self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None, force=True)

  def _write_digests(self) -> None:
    # On a disk it still has another name, by which it is no checkpoint.
    unfinished = f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
    names = [path.name for path in self._folder.iterdir() if path.name.startswith(unfinished)]
    written = self._folder / (names[0] if names else str(self._saving))
    digests.write(written, step=self._saving, run=self._digest)

  def wait(self) -> None:
    """Return when the save in progress is committed. Raises what went wrong with it."""
    self._manager.wait_until_finished()

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # A UserError, such as a loss that is not finite, reaches every process; after a bug in one process the others
    # will not reach the barrier at which this one would wait for them.
    if kind is None or issubclass(kind, (UserError, Preempted, Diverged)) or jax.process_count() == 1:
      self.wait()
      self._manager.close()


class Best(NamedTuple):
  """The checkpoint that was saved with the best value of a metric."""

  step: int
  value: float


def best(run: epath.PathLike, kept: CheckpointPolicy) -> Best | None:
  """Find the best checkpoint by `kept.best_metric`; the earliest of equals, None where none was measured by it."""
  folder, by_step = workdir.checkpoints(run), {}
  for step in workdir.committed_steps(folder) if kept.best_metric else ():
    try:
      by_step[step] = workdir.metrics_of(folder, step)
    except (OSError, UserError) as error:  # a run in training removes some, and beside a damaged one are others
      logging.warning("what checkpoint %d was measured at cannot be read: %s", step, error)
  # The steps come in order, and `max` keeps the first of equals.
  step = max(by_step, key=lambda step: _rank(by_step[step], kept=kept), default=0)
  value = by_step.get(step, {}).get(kept.best_metric, math.nan)
  return None if math.isnan(value) else Best(step, float(value))


def _on_one_device(array: Any) -> Any:
  """Give a replicated array as one of its devices holds it.

  Else Orbax has every device write a slice, to share the work among hosts, and compiles the slicing for each shape.
  """
  return array.addressable_data(0) if isinstance(array, jax.Array) and array.is_fully_replicated else array


def _rank(metrics: Mapping[str, float], *, kept: CheckpointPolicy) -> float:
  # NaN too is the least: Orbax sorts by this, and sorts nothing that has a NaN in it.
  value = metrics.get(kept.best_metric, math.nan)
  return -math.inf if math.isnan(value) else value if kept.best_is == "max" else -value
