"""The steps of a run, and what happens between them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from diffdis_jax.config.run import Run
from diffdis_jax.data import copies, loader
from diffdis_jax.data.build import batch_type
from diffdis_jax.errors import Preempted, UserError
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import checkpoint, profile, watchdog, writers
from diffdis_jax.structs import TrainingBatch, TrainState
from diffdis_jax.training import skips
from diffdis_jax.training.evaluator import Evaluator, UnknownMetric
from diffdis_jax.training.metrics import Metrics, read_totals, write_totals
from diffdis_jax.training.prepared import Prepared
from diffdis_jax.training.step import is_running, take_step


@dataclasses.dataclass(frozen=True)
class Tools:
  """What the steps of a run take, whichever is the first of them.

  Attributes:
    peak_rate: as `writers.Throughput` takes it.
  """

  run: Run
  prepared: Prepared
  iterator: grain.DatasetIterator
  evaluator: Evaluator
  checkpointer: checkpoint.Checkpointer
  stop: processes.PreemptionHandler
  dog: watchdog.Watchdog
  peak_rate: float | None


class Steps:
  """Those from `start_step` on, whose state was saved with `meta`, or is new."""

  def __init__(
    self,
    tools: Tools,
    writer: writers.Writer,
    profiler: profile.Profiler,
    *,
    start_step: int,
    meta: Mapping[str, Any],
  ):
    run = tools.run
    self._tools, self._writer, self._profiler = tools, writer, profiler
    self._start, self._evaluated = start_step, meta.get("evaluated", True)
    self._by_path = tools.prepared.trainer.layout.by_path
    self._progress = writers.Throughput(
      start_step=start_step, num_steps=run.num_steps, batch_size=run.batch_size, peak_rate=tools.peak_rate
    )
    self._substitutions, self._totals = loader.Substitutions(), read_totals(meta)
    self._skipped = skips.SkippedSteps(run.optim, meta.get("skipped", {}))
    if processes.is_first():
      saved = np.array(meta.get("substituted", ()), np.int64)
      self._substitutions.new[: len(saved)] += saved  # there are more reasons now than when some runs were saved
    self._metrics: Any = None  # of the last step

  def run_to_end(self, state: TrainState) -> None:
    """Take all steps that are left. Raises as train_and_evaluate."""
    tools, run = self._tools, self._tools.run
    # A run that was stopped in the middle of an evaluation saved without it. What was due then is done now.
    if not self._evaluated:
      measured, last = self._by_path(state), self._start == run.num_steps
      found = tools.evaluator.after_step(self._start, measured, self._writer, last=last)
      tools.checkpointer.add_metrics(self._start, found)

    train_step: Callable[..., Any] | None = None
    for step in self._progress.steps():
      tools.dog.alive()
      self._profiler.before(step, self._metrics)
      batch = self._next_batch()
      if train_step is None:
        train_step = tools.prepared.train_step.compiled()
        tools.stop.begin()  # until now there was nothing to save, and a signal ended the process at once
      last = step == run.num_steps
      logs = last or step % run.log_every == 0
      state, metrics = take_step(train_step, state, batch)
      self._after_step(step, metrics)

      # At steps that do not depend on when the run was stopped.
      if logs or step % run.save_every == 0:
        self._wait()
        if self._skipped.is_beyond(step):
          tools.checkpointer.wait()  # for the save that is still being written
          raise self._skipped.too_many(step, tools.checkpointer.latest_step())
      if logs:
        self._report(step)
      self._evaluate_and_save(step, state, last=last)
    tools.checkpointer.wait()  # for the last save, without which the run has not finished

  def _next_batch(self) -> TrainingBatch:
    """Loaded while the devices still work on the step before, so that its time is hidden."""
    tools = self._tools
    waiting = self._progress.waiting_for_data(functools.partial(is_running, self._metrics))
    with waiting, copies.naming_silence(tools.run.data.paths):
      rows = self._substitutions.take(next(tools.iterator))
      return batch_type(tools.run.data)(**sharding.to_global(rows, tools.prepared.trainer.mesh))

  def _after_step(self, step: int, metrics: Metrics) -> None:
    # One step ahead of the devices and no more, so that a wait for them is the time of a step.
    jax.block_until_ready(self._metrics)
    self._metrics = metrics = self._skipped.take(step, metrics, self._substitutions.rows)
    if step == self._start + 1:
      jax.block_until_ready(metrics)  # starting is no speed
      self._progress.restart(step)
    # Added up on the devices: to fetch them here would wait for the step.
    self._totals = metrics if self._totals is None else jax.tree.map(jnp.add, self._totals, metrics)
    if self._profiler.after(step):
      jax.block_until_ready(metrics)
      with self._progress.paused():
        self._profiler.close()

  def _wait(self) -> None:
    """For the steps that the devices are still at."""
    jax.block_until_ready(self._metrics)

  def _report(self, step: int) -> None:
    """Writes the means since the last report."""
    assert self._totals is not None
    means = check_finite(self._totals, step, self._tools.checkpointer)
    counts = self._substitutions.report(processes.over_hosts) | self._skipped.report()
    speeds = self._progress.report(step, means)
    lines = means | speeds | slowest_host(speeds["data_wait"]) | counts
    self._writer.scalars(step, lines)
    self._totals = None

  def _evaluate_and_save(self, step: int, state: TrainState, *, last: bool) -> None:
    """What is due after this step. Raises Preempted, or an evaluation's UserError, when it has been saved."""
    tools, found, failed = self._tools, {}, None
    preempted, due = tools.stop.agreed(), tools.evaluator.is_due(step, last=last)
    saves = last or bool(preempted) or step % tools.run.save_every == 0
    if due or saves:
      self._wait()  # its time is that of steps
    # Evaluation before the save, whose checkpoint is kept by what was measured; unless there is no time for it.
    if due and not preempted:
      tools.dog.alive()
      try:
        with self._progress.paused():
          measured = self._by_path(state)
          found, due = tools.evaluator.after_step(step, measured, self._writer, last=last), False
      except Preempted as stopped:
        preempted, saves = type(stopped), True
      except UserError as error:
        # Its data may be damaged, or its name misspelt, which is no reason to lose steps. Several processes would have
        # to agree on the former: what one of them has read may be its own rows'.
        if jax.process_count() > 1 and not isinstance(error, UnknownMetric):
          raise
        failed, saves = error, True
        logging.warning("an evaluation failed: saving step %d", step)
    # The save before the next batch is loaded, so that the iterator's position is that of the next step.
    if saves:
      tools.dog.alive()
      with self._progress.paused():
        self._save(step, state, found, evaluated=not due, required=last or bool(preempted))
    if failed:
      raise failed
    if preempted:
      logging.warning("asked to stop: saving step %d; run the same command again to resume", step)
      raise preempted

  def _save(self, step: int, state: TrainState, found: Mapping[str, float], *, evaluated: bool, required: bool) -> None:
    tools = self._tools
    # A checkpoint from which training cannot resume is worse than none.
    if self._totals is not None:
      check_finite(self._totals, step, tools.checkpointer)
    pending = processes.over_hosts(self._substitutions.new).tolist()
    self._writer.flush()
    meta = {"totals": write_totals(self._totals), "substituted": pending, "evaluated": evaluated}
    meta |= {"skipped": self._skipped.to_meta(), "norms": {name: float(x) for name, x in state.norms.items()}}
    saved = self._by_path(state)
    tools.checkpointer.save(step, saved, tools.iterator, meta=meta, metrics=found, required=required)


def slowest_host(data_wait: float) -> dict[str, float]:
  """Of several hosts, by each one's share of time spent waiting for data, the largest and whose it is: the others wait
  for it in every step. Every process calls this."""
  if jax.process_count() == 1:
    return {}
  shares = np.nan_to_num(processes.gathered(np.float32(data_wait)))
  return {"slowest_host": float(shares.argmax()), "slowest_host_data_wait": float(shares.max())}


def check_finite(totals: Metrics, step: int, checkpointer: checkpoint.Checkpointer) -> dict[str, float]:
  """Mean of each metric since the last report; fetching them waits for the step.

  Raises:
    UserError: the loss or the gradient is not finite.
  """
  means = {name: float(x.total) / float(x.count) if x.count else math.nan for name, x in jax.device_get(totals).items()}
  # Of steps that were all skipped there are no means.
  if any(totals[name].count and not math.isfinite(means[name]) for name in ("loss", "grad_norm")):
    checkpointer.wait()  # the save that is still being written may be the last good one
    kept = checkpointer.latest_step()
    raise UserError(
      f"loss {means['loss']} or gradient norm {means['grad_norm']} is not finite by step {step}; the last good"
      f" checkpoint is {'none' if kept is None else f'step {kept}'}; lower optim.rates, or set optim.clip_norm or"
      " model.dtype='float32', in a new workdir"
    )
  return means
