"""Training a config: its start, its steps, and what happens between them."""

from __future__ import annotations

import contextlib
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
from jax.sharding import Mesh

from diffdis_jax.common import buckets, files
from diffdis_jax.config.run import Run
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.data import copies, loader
from diffdis_jax.data.build import LatentShapes, batch_type, latent_facts, open_loader
from diffdis_jax.errors import Preempted, UserError
from diffdis_jax.inference import Inference
from diffdis_jax.method.network import Network
from diffdis_jax.parallel import batches, executables, processes, sharding
from diffdis_jax.run import checkpoint, committed, history, profile, trackers, watchdog, workdir, writers
from diffdis_jax.run.near import Near
from diffdis_jax.structs import TrainState
from diffdis_jax.training import facts, skips, start, stored_inputs
from diffdis_jax.training.evaluator import Evaluator, make_evaluator
from diffdis_jax.training.flops import rate_at_peak
from diffdis_jax.training.metrics import Metrics, read_totals, write_totals
from diffdis_jax.training.prepared import Prepared
from diffdis_jax.training.step import is_running


def train_and_evaluate(
  run: Run,
  path: str,
  *,
  tracker: str = "",
  profiled: str = "",
  prepared: Prepared | None = None,
  folder: executables.Folder | None = None,
  patience: float = watchdog.PATIENCE,
  near: Near | None = None,
) -> None:
  """Trains to `run.num_steps`, from the last checkpoint in the workdir `path` if there is one.

  Args:
    run: its config's record.
    path: its workdir.
    tracker: one of trackers.TRACKERS, which gets what the writers get; empty for none.
    profiled: steps to trace, as `profile.parse` takes them; empty for none.
    prepared: of this run; None to do it here, for a mesh of all devices.
    folder: where its programs may lie compiled, unless it is prepared; None for nowhere.
    patience: as `watchdog.Watchdog` has it.
    near: its near checkpoints; None for none.

  Raises:
    UserError: bad data or workdir, a config that the devices cannot train, or more steps to skip than may be.
    Preempted: SIGTERM or, as Interrupted, Ctrl-C came; the steps so far are saved.
  """
  # Flags first: they need neither devices nor data.
  span = profile.parse(profiled, num_steps=run.num_steps) if profiled else None
  trackers.check(tracker)
  if near:
    near.check()
  mesh = prepared.trainer.mesh if prepared else sharding.make_mesh(**vars(run.mesh))
  stop = processes.PreemptionHandler(sharding.batch_sharding(mesh))
  if jax.process_count() == 1:  # each of several has said so when it joined the others
    processes.log_place()
  with contextlib.ExitStack() as stack:
    stack.enter_context(stop.listening())  # from the start: building and compiling may take minutes

    # Everything that can be wrong with a config or its data is found before the workdir is touched.
    prepared = prepared or Prepared.of(run, mesh, folder)
    trainer, train_step = prepared.trainer, prepared.train_step
    rows = sharding.local_rows(mesh, run.batch_size)
    iterator = open_loader(run, rows=rows, latents=latent_shapes(trainer.network))
    dog = stack.enter_context(watchdog.Watchdog(patience).watching())

    def after_batch() -> None:
      dog.alive()
      stop.raise_if_agreed()

    inference = Inference(
      trainer.network, run.inference, mesh=mesh, batch_size=rows_at_a_time(run, mesh), after_batch=after_batch
    )
    evaluator = make_evaluator(run, inference)
    selection = trainer.plug.selection(run) if trainer.plug.selection else None
    facts.log(trainer)
    begins = committed.latest_step(path) is None
    if begins:
      start.find_initial(run.init_from, trainer)
    prepared.check(begins=begins)
    fields = run.to_dict()
    workdir.check_config(path, fields)  # open_for_training does it again, when no other process can change the folder
    processes.check_shared(path)

    # The lock before anything is written: two runs in one workdir would each drop the other's lines and checkpoints.
    processes.on_first(lambda: stack.enter_context(workdir.Lock(path)))
    is_writer = processes.is_first()
    before = workdir.lengthened(path, fields)
    workdir.open_for_training(path, fields, is_writer=is_writer)
    if is_writer:
      files.write_whole(buckets.path(path) / "parameters.txt", facts.overview(trainer).encode())
    if near:
      stack.enter_context(near)  # before the checkpointer, so that it ends after the last checkpoint is committed
    checkpointer = stack.enter_context(checkpoint.Checkpointer(path, run.checkpoint))
    if checkpointer.latest_step() != run.num_steps:
      train_step.start()  # in parallel to reading and initialising parameters, which may take a minute each
    if begins:
      trainer.assemble.start()
    made = functools.partial(selection.params, inference, path) if selection else None
    track = functools.partial(trackers.open_tracker, tracker, path, fields)
    peak_rate = rate_at_peak(trainer)

    def go_on() -> None:
      """To the end from the last checkpoint, if there is one. Raises WentBack: to do so again."""
      dog.at("the start", storage=True)
      state, meta = start.restore_or_init(trainer, checkpointer, iterator, made, near)
      # Not before: the fingerprints are of parameters, which are there only now.
      stored_inputs.check_stored(latent_facts(run.data), state.params, trainer.trainable)
      step = int(state.step)
      if before is not None:
        facts.log_longer(run, before, step)
      known, left_out = facts.of_start(trainer, begins=not step), skips.left_out(path)
      # What is entered closes from the last to the first: trace, lines, history; then a pending save, and the lock.
      with contextlib.ExitStack() as inner:
        inner.enter_context(history.recorded(path, step=step, is_writer=is_writer, facts=known))
        writer = writers.open_writer(path, start_step=step, is_writer=is_writer, open_tracker=track)
        inner.enter_context(contextlib.closing(writer))
        profiler = inner.enter_context(contextlib.closing(profile.Profiler(span, path, start_step=step)))
        loop = Loop(
          run, prepared, iterator, evaluator, checkpointer, near, writer, stop, profiler, peak_rate, left_out, dog
        )
        found = loop.run_to_end(state, meta)
        # Raised here, when the loop's state is gone: beside another one devices may have no room for it.
        if found is not None:
          raise found

    try:
      go_on()
    except history.WentBack as found:
      logging.warning("%s", found)
      go_on()
    log_best(path, run.checkpoint, checkpointer)


def log_best(path: str, kept: CheckpointPolicy, checkpointer: checkpoint.Checkpointer) -> None:
  """Which checkpoint of a finished run is the best, where that is defined."""
  if not kept.best_metric:
    return
  checkpointer.wait()  # for the last save
  if best := checkpoint.best(path, kept):
    logging.info("best %s %.4f at step %d: evaluate --best measures it", kept.best_metric, best.value, best.step)


@dataclasses.dataclass(frozen=True)
class Loop:
  """The steps of a run, and what happens between them."""

  run: Run
  prepared: Prepared
  iterator: grain.DatasetIterator
  evaluator: Evaluator
  checkpointer: checkpoint.Checkpointer
  near: Near | None
  writer: writers.Writer
  stop: processes.PreemptionHandler
  profiler: profile.Profiler
  peak_rate: float | None
  left_out: history.WentBack | None
  dog: watchdog.Watchdog

  def run_to_end(self, state: TrainState, meta: Mapping[str, Any]) -> history.WentBack | None:
    """Steps to the last one from `state`, which has been saved with `meta`, or is new. Raises as train_and_evaluate.

    Returns None at the end, or to which checkpoint the run goes back.
    """
    run, start_step = self.run, int(state.step)
    progress = writers.Throughput(
      start_step=start_step, num_steps=run.num_steps, batch_size=run.batch_size, peak_rate=self.peak_rate
    )
    substitutions, totals = loader.Substitutions(), read_totals(meta)
    skipped = skips.SkippedSteps(run.optim, meta.get("skipped", {}))
    if processes.is_first():
      saved = np.array(meta.get("substituted", ()), np.int64)
      substitutions.new[: len(saved)] += saved  # there are more reasons now than when some runs were saved
    # A run that was stopped in the middle of an evaluation saved without it. What was due then is done now.
    if not meta.get("evaluated", True):
      self.dog.at("an evaluation", storage=True)
      self.evaluator.after_step(start_step, state, self.writer, last=start_step == run.num_steps)

    metrics: Any = None
    train_step: Callable[..., tuple[TrainState, Metrics]] | None = None
    compare: Callable[..., dict[str, Any]] = lambda state, batch: {}
    for step in progress.steps():
      self.profiler.before(step, metrics)
      # The next batch is loaded while the devices still work on the step before, so that its time is hidden.
      waiting = progress.waiting_for_data(functools.partial(is_running, metrics))
      self.dog.at("reading a batch", storage=True)
      with waiting, copies.naming_silence(run.data.paths):
        for _ in range(self.left_out.batches if self.left_out and self.left_out.to == step - 1 else 0):
          next(self.iterator)
        rows = substitutions.take(next(self.iterator))
        batch = batch_type(run.data)(**sharding.to_global(rows, self.prepared.trainer.mesh))
      if train_step is None:
        train_step = self.prepared.train_step.compiled()
        compare = self.prepared.gradients.compiled() if self.prepared.gradients else compare
        self.stop.begin()  # until now there was nothing to save, and a signal ended the process at once
      last = step == run.num_steps
      logs = last or step % run.log_every == 0
      self.dog.at("a step")
      gradients = compare(state, batch) if logs else {}  # before the step, which takes the state's memory
      state, metrics = train_step(state, batch)
      metrics = skipped.take(step, metrics, substitutions.rows)
      if step == start_step + 1:
        jax.block_until_ready(metrics)  # starting is no speed
        progress.restart(step)
      # Added up on the devices: to fetch them here would wait for the step.
      totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
      if self.profiler.after(step):
        jax.block_until_ready(metrics)
        with progress.paused():
          self.profiler.close()

      # At steps that do not depend on when the run was stopped.
      if logs or step % run.save_every == 0:
        if skipped.is_beyond(step):
          self.checkpointer.wait()  # for the save that is still being written
          return skipped.back_from(step, self.checkpointer.latest_step(), self.left_out)
      if logs:
        self.dog.at("the steps since the last report")
        means = check_finite(totals, step, self.checkpointer)
        counts = substitutions.report(processes.over_hosts) | skipped.report() | jax.tree.map(float, gradients)
        speeds = progress.report(step, means)
        self.writer.scalars(step, means | speeds | slowest_host(speeds["data_wait"]) | counts)
        totals = None
      found, preempted, due = {}, self.stop.agreed(), self.evaluator.is_due(step, last=last)
      saves = last or bool(preempted) or step % run.save_every == 0
      near = self.near is not None and self.near.is_due(step) and not last
      if due or saves or near:
        self.dog.at("the steps before a save or an evaluation")
        jax.block_until_ready(metrics)  # its time is that of steps
      # Evaluation before the save, whose checkpoint is kept by what was measured; unless there is no time for it.
      if due and not preempted:
        self.dog.at("an evaluation", storage=True)
        try:
          with progress.paused():
            found, due = self.evaluator.after_step(step, state, self.writer, last=last), False
        except Preempted as stopped:
          preempted, saves = type(stopped), True
      # The save before the next batch is loaded, so that the iterator's position is that of the next step.
      near = near and not preempted  # for which there is no time
      if saves or near:
        self.dog.at("a save", storage=True)
        with progress.paused():
          which = {"near": near, "far": saves, "required": last or bool(preempted)}
          self._save(step, state, totals, substitutions, skipped, found, evaluated=not due, **which)
      if preempted:
        logging.warning("asked to stop: saving step %d; run the same command again to resume", step)
        raise preempted

  def _save(
    self,
    step: int,
    state: TrainState,
    totals: Metrics | None,
    substitutions: loader.Substitutions,
    skipped: skips.SkippedSteps,
    found: Mapping[str, float],
    *,
    evaluated: bool,
    near: bool,
    far: bool,
    required: bool,
  ) -> None:
    # A checkpoint from which training cannot resume is worse than none.
    if totals is not None:
      check_finite(totals, step, self.checkpointer)
    pending = processes.over_hosts(substitutions.new).tolist()
    flushed = self.writer.flush()
    meta = {"totals": write_totals(totals), "substituted": pending, "evaluated": evaluated}
    meta |= {"skipped": skipped.to_meta(), "norms": {name: float(x) for name, x in state.norms.items()}}
    if near and self.near:  # first: it is there when the other one cannot be written
      self.near.save(step, state, self.iterator, meta=meta, ready=flushed)
    if far:
      self.checkpointer.save(step, state, self.iterator, meta=meta, metrics=found, required=required)


def rows_at_a_time(run: Run, mesh: Mesh) -> int:
  """Of a call of evaluations and samples: no more than a step has, beside whose state they must fit, and which may take
  a batch in parts; of a whole batch at least 64."""
  of_step = run.batch_size // run.optim.accumulate
  if run.optim.accumulate == 1:
    of_step = max(of_step, batches.ROWS)
  return min(batches.rows_of_a_call(mesh), of_step)


def slowest_host(data_wait: float) -> dict[str, float]:
  """Of several hosts, by each one's share of time spent waiting for data, the largest and whose it is: the others wait
  for it in every step. Every process calls this."""
  if jax.process_count() == 1:
    return {}
  shares = np.nan_to_num(processes.gathered(np.float32(data_wait)))
  return {"slowest_host": float(shares.argmax()), "slowest_host_data_wait": float(shares.max())}


def latent_shapes(network: Network) -> LatentShapes | None:
  """What stored latents must fit; None for the training of an autoencoder, of CLIP or on labels, which needs images."""
  if network.objectives.needs_images:
    return None
  return LatentShapes(latent=network.latent_shape, text_width=network.model.text_encoder.width)


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
