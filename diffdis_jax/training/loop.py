"""Training a config: its start, its steps, and what happens between them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu.metrics import Average
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, files
from diffdis_jax.common.params import Params
from diffdis_jax.data import copies, loader
from diffdis_jax.data.build import Data, LatentShapes, open_loader, read_data
from diffdis_jax.errors import Preempted, UserError, check_number, read_section
from diffdis_jax.evals import registry as evals
from diffdis_jax.inference import Inference, Sampling, read_sampling
from diffdis_jax.method.network import LONG_TAIL, Network
from diffdis_jax.parallel import processes, programs, sharding
from diffdis_jax.run import checkpoint, committed, history, profile, trackers, workdir, writers
from diffdis_jax.training import anchors, facts, start, stored_inputs
from diffdis_jax.training.build import build_step, read_long_tail
from diffdis_jax.training.evaluator import Evaluator
from diffdis_jax.training.flops import abstract_batch, rate_at_peak
from diffdis_jax.training.metrics import Metrics
from diffdis_jax.training.optim import Optim
from diffdis_jax.training.step import Trainer, TrainState, is_running

MOST_STEPS = 2**31 - 1  # which a step's number, an int32, counts to
MOST_ROWS = 2**22  # of a global batch, far above any that was trained with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervals:
  """How long a run is, and after how many steps what happens.

  Raises:
    UserError: a number below one, or beyond what a run can have.
  """

  batch_size: int
  num_steps: int
  log_every: int
  save_every: int
  eval_every: int
  sample_every: int

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      check_number(field.name, getattr(self, field.name), at_least=1, at_most=MOST_STEPS)
    check_number("batch_size", self.batch_size, at_most=MOST_ROWS)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a config trains with; nothing is allocated yet."""

  mesh: Mesh
  data: Data
  trainer: Trainer
  train_step: programs.AheadOfTime

  @classmethod
  def of(cls, config: ConfigDict, mesh: Mesh) -> Prepared:
    """Raises UserError: bad config or data."""
    data, trainer = read_data(config), build_step(config, mesh)
    shapes = abstract_batch(trainer.network, data, mesh, config.batch_size)
    train_step = programs.AheadOfTime("the training step", trainer.train_step, trainer.abstract_state, shapes)
    return cls(mesh, data, trainer, train_step)

  def compile_ahead(self) -> None:
    """Has threads compile all that takes long before the first step of a new run."""
    self.trainer.initialise.start()
    self.train_step.start()


class Sections(NamedTuple):
  """What of a config is checked in a moment."""

  intervals: Intervals
  kept: checkpoint.CheckpointPolicy
  sampling: Sampling


def read_sections(config: ConfigDict) -> Sections:
  """Raises UserError: a field of a wrong type, or a number out of its range."""
  run_config.check_types(config.to_dict())
  read_section(Optim, config.optim.to_dict(), "optim")  # build_step reads it again, with what needs the devices
  return Sections(
    Intervals(**{field.name: config[field.name] for field in dataclasses.fields(Intervals)}),
    read_section(checkpoint.CheckpointPolicy, config.checkpoint.to_dict(), "checkpoint"),
    read_sampling(config.inference.to_dict()),
  )


def train_and_evaluate(
  config: ConfigDict, path: str, *, tracker: str = "", profiled: str = "", prepared: Prepared | None = None
) -> None:
  """Trains to `config.num_steps`, from the last checkpoint in the workdir `path` if there is one.

  Args:
    config: of the run.
    path: its workdir.
    tracker: one of trackers.TRACKERS, which gets what the writers get; empty for none.
    profiled: steps to trace, as `profile.parse` takes them; empty for none.
    prepared: of this config; None to do it here, for a mesh of all devices.

  Raises:
    UserError: bad config, data or workdir, or a loss that is no longer finite.
    Preempted: SIGTERM or, as Interrupted, Ctrl-C came; the steps so far are saved.
  """
  intervals, kept, sampling = read_sections(config)  # first: then comes what takes seconds to build
  span = profile.parse(profiled, num_steps=intervals.num_steps) if profiled else None
  trackers.check(tracker)
  mesh = prepared.mesh if prepared else sharding.make_mesh(**config.mesh)
  stop = processes.PreemptionHandler(sharding.batch_sharding(mesh))
  if jax.process_count() == 1:  # each of several has said so when it joined the others
    processes.log_place()
  with contextlib.ExitStack() as stack:
    stack.enter_context(stop.listening())  # from the start: building and compiling may take minutes

    # Everything that can be wrong with a config or its data is found before the workdir is touched.
    prepared = prepared or Prepared.of(config, mesh)
    data, trainer, train_step = prepared.data, prepared.trainer, prepared.train_step
    iterator = open_loader(
      data,
      batch_size=intervals.batch_size,
      seed=config.seed,
      rows=sharding.local_rows(mesh, intervals.batch_size),
      latents=latent_shapes(trainer.network),
    )
    evaluator = make_evaluator(config, intervals, sampling, trainer, stop)
    selection = make_selection(config, data, trainer)
    facts.log(trainer, data)
    if committed.latest_step(path) is None:
      start.find_initial(config.init_from, trainer)
    fields = config.to_dict()
    workdir.check_config(path, fields)
    processes.check_shared(path)

    # The lock before anything is written: two runs in one workdir would each drop the other's lines and checkpoints.
    processes.on_first(lambda: stack.enter_context(workdir.Lock(path)))
    is_writer = processes.is_first()
    workdir.open_for_training(path, fields, is_writer=is_writer)
    if is_writer:
      files.write_whole(buckets.path(path) / "parameters.txt", facts.overview(trainer).encode())
    checkpointer = stack.enter_context(checkpoint.Checkpointer(path, kept))
    if checkpointer.latest_step() != intervals.num_steps:
      train_step.start()  # beside what reads and draws parameters, of which each may take a minute
    made = functools.partial(choose_anchors, selection, path, trainer, sampling, stop) if selection else no_params
    state, meta = start.restore_or_init(config.init_from, config.seed, trainer, checkpointer, iterator, made)
    stored_inputs.check_stored(data.latent_facts(), state.params, trainer.trainable)
    step = int(state.step)
    known = facts.of_start(trainer, data, init_from=None if step else config.init_from)
    stack.enter_context(history.recorded(path, step=step, is_writer=is_writer, facts=known))
    track = functools.partial(trackers.open_tracker, tracker, path, fields)
    writer = writers.open_writer(path, start_step=step, is_writer=is_writer, open_tracker=track)
    stack.enter_context(contextlib.closing(writer))
    profiler = stack.enter_context(contextlib.closing(profile.Profiler(span, path, start_step=step)))
    peak_rate = rate_at_peak(config, trainer, data)

    loop = Loop(
      intervals, data, trainer, train_step, iterator, evaluator, checkpointer, writer, stop, profiler, peak_rate
    )
    loop.run(state, meta)
    log_best(path, kept, checkpointer)


def log_best(path: str, kept: checkpoint.CheckpointPolicy, checkpointer: checkpoint.Checkpointer) -> None:
  """Which checkpoint of a finished run is the best, where that is defined."""
  if not kept.best_metric:
    return
  checkpointer.wait()  # for the last save
  if best := checkpoint.best(path, kept):
    logging.info("best %s %.4f at step %d: evaluate --best measures it", kept.best_metric, best.value, best.step)


@dataclasses.dataclass(frozen=True)
class Loop:
  """The steps of a run, and what happens between them."""

  intervals: Intervals
  data: Data
  trainer: Trainer
  train_step: programs.AheadOfTime
  iterator: grain.DatasetIterator
  evaluator: Evaluator
  checkpointer: checkpoint.Checkpointer
  writer: writers.Writer
  stop: processes.PreemptionHandler
  profiler: profile.Profiler
  peak_rate: float | None

  def run(self, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Steps to the last one from `state`, which has been saved with `meta`, or is new. Raises as train_and_evaluate."""
    intervals, start_step = self.intervals, int(state.step)
    progress = writers.Throughput(
      start_step=start_step, num_steps=intervals.num_steps, batch_size=intervals.batch_size, peak_rate=self.peak_rate
    )
    substitutions, totals = loader.Substitutions(), read_totals(meta)
    if processes.is_first():
      saved = np.array(meta.get("substituted", ()), np.int64)
      substitutions.new[: len(saved)] += saved  # there are more reasons now than when some runs were saved
    # A run that was stopped in the middle of an evaluation saved without it. What was due then is done now.
    if not meta.get("evaluated", True):
      self.evaluator.after_step(start_step, state, self.writer, last=start_step == intervals.num_steps)

    metrics: Any = None
    train_step: Callable[..., tuple[TrainState, Metrics]] | None = None
    for step in progress.steps():
      self.profiler.before(step, metrics)
      # The next batch is drawn while the devices still work on the step before, so that its time is hidden.
      waiting = progress.waiting_for_data(functools.partial(is_running, metrics))
      with waiting, copies.naming_silence(self.data.paths):
        rows = substitutions.take(next(self.iterator))
        batch = self.data.batch_type(**sharding.to_global(rows, self.trainer.mesh))
      if train_step is None:
        train_step = self.train_step.compiled()
        self.stop.begin()
      state, metrics = train_step(state, batch)
      if step == start_step + 1:
        jax.block_until_ready(metrics)  # starting is no speed
        progress.restart(step)
      totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
      if self.profiler.after(step):
        jax.block_until_ready(metrics)
        with progress.paused():
          self.profiler.close()

      last = step == intervals.num_steps
      if last or step % intervals.log_every == 0:
        means = check_finite(totals, step, self.checkpointer)
        counts = substitutions.report(processes.over_hosts)
        self.writer.scalars(step, means | progress.report(step, means) | counts)
        totals = None
      found, preempted, due = {}, self.stop.agreed(), self.evaluator.is_due(step, last=last)
      saves = last or bool(preempted) or step % intervals.save_every == 0
      if due or saves:
        jax.block_until_ready(metrics)  # its time is that of steps
      # Evaluation before the save, whose checkpoint is kept by what was measured; unless there is no time for it.
      if due and not preempted:
        try:
          with progress.paused():
            found, due = self.evaluator.after_step(step, state, self.writer, last=last), False
        except Preempted as stopped:
          preempted, saves = type(stopped), True
      # The save before the next batch is drawn, so that the iterator's position is that of the next step.
      if saves:
        with progress.paused():
          self._save(step, state, totals, substitutions, found, evaluated=not due)
      if preempted:
        logging.warning("asked to stop: saving step %d; the same command goes on from there", step)
        raise preempted

  def _save(
    self,
    step: int,
    state: TrainState,
    totals: Metrics | None,
    substitutions: loader.Substitutions,
    found: Mapping[str, float],
    *,
    evaluated: bool,
  ) -> None:
    # A checkpoint that cannot go on is worse than none.
    if totals is not None:
      check_finite(totals, step, self.checkpointer)
    pending = processes.over_hosts(substitutions.new).tolist()
    self.writer.flush()
    meta = {"totals": write_totals(totals), "substituted": pending, "evaluated": evaluated}
    self.checkpointer.save(step, state, self.iterator, meta=meta, metrics=found)


def latent_shapes(network: Network) -> LatentShapes | None:
  """What stored latents must fit; None for the training of an autoencoder, of CLIP or on labels, which needs images."""
  if {"reconstruction", "contrastive", *LONG_TAIL} & {*network.objectives}:
    return None
  return LatentShapes(latent=network.latent_shape, text_width=network.model.text_encoder.width)


def write_totals(totals: Metrics | None) -> dict[str, list[float]]:
  """Metrics summed since the last report, as JSON, bit for bit."""
  return {name: [float(x.total), float(x.count)] for name, x in jax.device_get(totals or {}).items()}


def read_totals(meta: Mapping[str, Any]) -> Metrics | None:
  """The inverse of `write_totals`, so that a report over steps before and after a restart is that of one run."""
  saved = meta.get("totals") or {}
  return {
    name: Average(total=np.float32(total), count=np.float32(count)) for name, (total, count) in saved.items()
  } or None


def check_finite(totals: Metrics, step: int, checkpointer: checkpoint.Checkpointer) -> dict[str, float]:
  """Mean of each metric since the last report; fetching them waits for the step.

  Raises:
    UserError: the loss or the gradient is not finite.
  """
  means = {name: float(x.total) / float(x.count) if x.count else math.nan for name, x in jax.device_get(totals).items()}
  if not (math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])):
    checkpointer.wait()
    kept = checkpointer.latest_step()
    raise UserError(
      f"loss {means['loss']} or gradient norm {means['grad_norm']} is not finite by step {step}; the last good"
      f" checkpoint is {'none' if kept is None else f'step {kept}'}; lower optim.rates, or set optim.clip_norm or"
      " model.dtype='float32', in a new workdir"
    )
  return means


def make_evaluator(
  config: ConfigDict, intervals: Intervals, sampling: Sampling, trainer: Trainer, stop: processes.PreemptionHandler
) -> Evaluator:
  """The evaluations and samples of a config.

  Raises:
    UserError: evaluations that the config does not have, or of what its objectives do not train; or bad settings or
      data of one.
  """
  if missing := set(config.train_evals) - set(config.evals):
    raise UserError(f"train_evals names {', '.join(sorted(missing))}; evals has {', '.join(config.evals) or 'none'}")
  best = config.checkpoint.best_metric
  if best and best.split("/")[0] not in config.train_evals:
    raise UserError(f"checkpoint.best_metric={best} should begin with one of train_evals, {config.train_evals}")
  for name in config.train_evals:
    evals.check_objectives(name, config.evals[name].task, config.objectives)
  return Evaluator(
    Inference(trainer.network, sampling, mesh=trainer.mesh, after_batch=stop.raise_if_agreed),
    eval_every=intervals.eval_every,
    sample_every=intervals.sample_every,
    evaluations={name: evals.create(**config.evals[name].to_dict()) for name in config.train_evals},
    prompts=list(config.sample_prompts) if "generation" in config.objectives else [],
    seed=config.seed,
    best_metric=best,
  )


def make_selection(config: ConfigDict, data: Data, trainer: Trainer) -> anchors.Selection | None:
  """How the head's anchors are chosen; None for a run without a head. Raises UserError: as `Selection`."""
  head, section = trainer.network.model.head, read_long_tail(config)
  if head is None or section is None:
    return None
  return anchors.Selection(data, section, classes=head.classes, count=head.anchors, seed=config.seed)


def no_params(params: Params) -> Params:
  """Of a run whose parameters are all loaded or drawn."""
  del params
  return {}


def choose_anchors(
  selection: anchors.Selection,
  path: str,
  trainer: Trainer,
  sampling: Sampling,
  stop: processes.PreemptionHandler,
  params: Params,
) -> Params:
  """The head's anchors, by the backbone among `params`; anchors.json in the workdir says which they are.

  Raises:
    Preempted: the processes stop in the middle of it; the same command begins it again.
  """
  model = Inference(trainer.network, sampling, mesh=trainer.mesh, after_batch=stop.raise_if_agreed)
  chosen = selection.run(model, params)
  if processes.is_first():
    files.write_json(buckets.path(path) / "anchors.json", chosen.describe(selection.corpus))
  return sharding.replicated({start.ANCHORS: chosen.embeddings}, trainer.mesh)
