"""Trains a config.

  python -m diffdis_jax.train --config=configs/NAME.py[:args] --workdir=DIR [--config.a.b=v ...]

Run again with the same workdir, it goes on from the last checkpoint to the same numbers, on any number of processes and
devices. At SIGTERM it saves and exits with code 75.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from diffdis_jax import cli, evals
from diffdis_jax.data import loader
from diffdis_jax.data.build import Data, LatentShapes, open_loader, read_data
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import Preempted, UserError, check_number, read_section
from diffdis_jax.evals import samples
from diffdis_jax.inference import Inference, Sampling, read_sampling
from diffdis_jax.models.build import Network
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.params import Params
from diffdis_jax.run import checkpoint, workdir, writers
from diffdis_jax.training import encode
from diffdis_jax.training.build import build_step
from diffdis_jax.training.objectives import Metrics
from diffdis_jax.training.step import Step, TrainState, is_running


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
  """How long a run is, and after how many steps what happens.

  Raises:
    UserError: a number below one.
  """

  batch_size: int
  num_steps: int
  log_every: int
  save_every: int
  eval_every: int
  sample_every: int

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      check_number(field.name, getattr(self, field.name), at_least=1)


def train_and_evaluate(config: ConfigDict, path: str) -> None:
  """Trains to `config.num_steps`, from the last checkpoint in the workdir `path` if there is one.

  Raises:
    UserError: bad config, data or workdir, or a loss that is no longer finite.
    Preempted: SIGTERM came; the steps so far are saved.
  """
  # Every section first, whose numbers are checked at once; then what takes seconds to build.
  pace = Pace(**{field.name: config[field.name] for field in dataclasses.fields(Pace)})
  kept = read_section(checkpoint.Kept, config.checkpoint.to_dict(), "checkpoint")
  sampling = read_sampling(config.inference.to_dict())
  data = read_data(config)
  mesh = sharding.make_mesh(**config.mesh)
  stop = processes.Stop(sharding.batch_sharding(mesh))
  with contextlib.ExitStack() as stack:
    stack.enter_context(stop.listening())  # from the start: building and compiling may take minutes

    # Everything that can be wrong with a config or its data is found before the workdir is touched.
    trainer = build_step(config, mesh)
    iterator = open_loader(
      data,
      batch_size=pace.batch_size,
      seed=config.seed,
      rows=sharding.local_rows(mesh, pace.batch_size),
      latents=latent_shapes(trainer.network),
    )
    watch = make_watch(config, pace, sampling, trainer, stop)
    log_start(trainer, data)
    if config.init_from and checkpoint.latest_step(path) is None:
      find_initial(config.init_from, trainer)
    workdir.check_config(path, config.to_dict())
    processes.check_shared(path)

    # The lock before anything is written: two runs in one workdir would each drop the other's lines and checkpoints.
    processes.on_first(lambda: stack.enter_context(workdir.Lock(path)))
    is_writer = processes.is_first()
    workdir.open_for_training(path, config.to_dict(), is_writer=is_writer)
    checkpointer = stack.enter_context(checkpoint.Checkpointer(path, kept))
    state, meta = restore_or_init(config.init_from, config.seed, trainer, checkpointer, iterator)
    encode.check_stored(data.latent_facts(), state.params, trainer.trainable)
    start = int(state.step)
    writer = writers.open_writer(path, start_step=start, is_writer=is_writer)
    stack.callback(writer.close)
    progress = writers.Progress(start_step=start, num_steps=pace.num_steps, batch_size=pace.batch_size)
    substitutions = loader.Substitutions()
    totals = read_totals(meta)
    if is_writer:
      substitutions.new += np.array(meta.get("substituted", 0))
    # A run that was stopped in the middle of an evaluation had saved before it. What was due then is done now.
    if not meta.get("watched", True):
      watch.after_step(start, state, writer, last=start == pace.num_steps)

    metrics: Any = None
    for step in range(start + 1, pace.num_steps + 1):
      # The next batch is drawn while the devices still work on the step before, so that its time is hidden.
      with progress.waiting_for_data(functools.partial(is_running, metrics)):
        batch = data.batch_type(**sharding.to_global(substitutions.take(next(iterator)), mesh))
      state, metrics = trainer.train_step(state, batch)
      if step == start + 1:
        jax.block_until_ready(metrics)
        progress.restart(step)
      totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)

      last = step == pace.num_steps
      if last or step % pace.log_every == 0:
        means = check_finite(totals, step, checkpointer)
        counts = substitutions.report(processes.over_hosts)
        writer.scalars(step, means | progress.report(step, means) | counts)
        totals = None
      found, preempted, due = {}, stop.agreed(), watch.is_due(step, last=last)
      saves = last or preempted or step % pace.save_every == 0
      if due or saves:
        jax.block_until_ready(metrics)  # its time is that of steps
      # Evaluation before the save, whose checkpoint is kept by what was measured; unless there is no time for it.
      if due and not preempted:
        try:
          with progress.paused():
            found, due = watch.after_step(step, state, writer, last=last), False
        except Preempted:
          preempted = saves = True
      # The save before the next batch is drawn, so that the iterator's position is that of the next step.
      if saves:
        with progress.paused():
          if totals is not None:
            check_finite(totals, step, checkpointer)  # a checkpoint that cannot go on is worse than none
          pending = processes.over_hosts(substitutions.new).tolist()
          meta = {"totals": write_totals(totals), "substituted": pending, "watched": not due}
          checkpointer.save(step, state, iterator, meta=meta, metrics=found)
      if preempted:
        logging.warning("asked to stop: saving step %d; the same command goes on from there", step)
        raise Preempted


def latent_shapes(network: Network) -> LatentShapes | None:
  """What stored latents must fit; None for an autoencoder's own training, which needs images."""
  if "reconstruction" in network.objectives:
    return None
  return LatentShapes(latent=network.latent_shape, text_width=network.model.text_encoder.width)


def restore_or_init(
  init_from: str, seed: int, trainer: Step, checkpointer: checkpoint.Checkpointer, iterator: grain.DatasetIterator
) -> tuple[TrainState, dict[str, Any]]:
  """The last checkpoint's state and meta, with the data iterator set to its next batch; or the state of step 0."""
  step = checkpointer.latest_step()
  if step is not None:
    restored = checkpointer.restore(step, trainer.abstract_state, iterator)
    logging.info("going on from step %d", step)
    place = trainer.state_shardings.step
    number = jax.make_array_from_callback((), place, lambda _: np.asarray(step, np.int32))
    state = TrainState(step=number, params=restored.params, ema=restored.ema, opt_state=restored.opt_state)
    return state, restored.meta
  params = trainer.init_params(jax.random.key(seed))
  if init_from:
    params |= load_initial(init_from, trainer)
  return trainer.with_params(params), {}


def write_totals(totals: Metrics | None) -> dict[str, list[float]]:
  """Metrics summed since the last report, as JSON, bit for bit."""
  return {name: [float(x) for x in pair] for name, pair in jax.device_get(totals or {}).items()}


def read_totals(meta: Mapping[str, Any]) -> Metrics | None:
  """The inverse of `write_totals`, so that a report over steps before and after a restart is that of one run."""
  saved = meta.get("totals") or {}
  return {name: (np.float32(total), np.float32(count)) for name, (total, count) in saved.items()} or None


def find_initial(path: str, trainer: Step) -> Params:
  """Shapes of another run's parameters, some of which this network has too.

  Raises:
    UserError: no run there, nothing in common, or a parameter of another shape.
  """
  saved = checkpoint.saved_params(path)
  common = saved.keys() & trainer.shapes.keys()
  if not common:
    raise UserError(f"init_from={path} has no parameter of this network; it holds {parts_of(saved)}")
  for name in sorted(common):
    if saved[name].shape != trainer.shapes[name].shape:
      raise UserError(
        f"init_from={path}: {name} has shape {saved[name].shape} there and {trainer.shapes[name].shape} in this"
        " config; use the same model section"
      )
  return saved


def load_initial(path: str, trainer: Step) -> Params:
  """Parameters of another run that this network has too; averaged ones where that run keeps them.

  Raises:
    UserError: as `find_initial`.
  """
  saved = find_initial(path, trainer)
  abstract = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    saved,
    sharding.shardings(saved, trainer.mesh, saved),
  )
  params = checkpoint.restore_params(path, abstract=abstract)
  loaded = {name: value for name, value in params.items() if name in trainer.shapes}
  logging.info("init_from %s: loaded %s", path, parts_of(loaded))
  logging.info("initialised: %s", parts_of(trainer.shapes.keys() - loaded.keys()) or "nothing")
  logging.info("ignored: %s", parts_of(saved.keys() - loaded.keys()) or "nothing")
  return loaded


def parts_of(paths: Iterable[str]) -> str:
  """`unet 686, autoencoder 250`: how many of these parameters each part has."""
  return ", ".join(f"{part} {n}" for part, n in sorted(Counter(path.split(".")[0] for path in paths).items()))


def check_finite(totals: Metrics, step: int, checkpointer: checkpoint.Checkpointer) -> dict[str, float]:
  """Mean of each metric since the last report; fetching them waits for the step.

  Raises:
    UserError: the loss or the gradient is not finite.
  """
  means = {
    name: float(total) / float(count) if count else math.nan for name, (total, count) in jax.device_get(totals).items()
  }
  if not (math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])):
    checkpointer.wait()
    kept = checkpointer.latest_step()
    raise UserError(
      f"loss {means['loss']} or gradient norm {means['grad_norm']} is not finite by step {step}; the last good"
      f" checkpoint is {'none' if kept is None else f'step {kept}'}; lower optim.rates, or set optim.clip_norm or"
      " model.dtype='float32', in a new workdir"
    )
  return means


def make_watch(config: ConfigDict, pace: Pace, sampling: Sampling, trainer: Step, stop: processes.Stop) -> Watch:
  """The evaluations and samples of a config.

  Raises:
    UserError: evaluations that the config does not have, or bad settings or data of one.
  """
  if missing := set(config.train_evals) - set(config.evals):
    raise UserError(f"train_evals names {', '.join(sorted(missing))}; evals has {', '.join(config.evals) or 'none'}")
  best = config.checkpoint.best_metric
  if best and best.split("/")[0] not in config.train_evals:
    raise UserError(f"checkpoint.best_metric={best} should begin with one of train_evals, {config.train_evals}")
  return Watch(
    Inference(trainer.network, sampling, mesh=trainer.mesh, after_batch=stop.raise_if_agreed),
    pace,
    evaluations={name: evals.create(**config.evals[name].to_dict()) for name in config.train_evals},
    prompts=list(config.sample_prompts) if "generation" in config.objectives else [],
    seed=config.seed,
    best_metric=best,
  )


class Watch:
  """Evaluations and sample images during training.

  Args:
    inference: of the network in training.
    pace: when.
    evaluations: by name.
    prompts: of the sample images.
    seed: of their noise.
    best_metric: which of the metrics decides on the best checkpoints; empty for none.
  """

  def __init__(
    self,
    inference: Inference,
    pace: Pace,
    *,
    evaluations: Mapping[str, evals.Eval],
    prompts: Sequence[str],
    seed: int,
    best_metric: str,
  ):
    self._inference, self._pace = inference, pace
    self._evals, self._prompts = evaluations, prompts
    self._seed, self._best = seed, best_metric

  def is_due(self, step: int, *, last: bool) -> bool:
    """Whether there is something to do after this step."""
    return self._evaluates(step, last) or self._draws(step, last)

  def after_step(self, step: int, state: TrainState, writer: writers.Writer, *, last: bool) -> dict[str, float]:
    """Does what is due, and writes it when all of it is done; returns the metrics, the same on every process.

    Raises:
      Preempted: the processes stop in the middle of it; nothing was written.
      UserError: `checkpoint.best_metric` is none of the metrics.
    """
    params = {**state.params, **state.ema}
    found = {}
    for name, evaluation in self._evals.items() if self._evaluates(step, last) else ():
      metrics = evaluation.run(self._inference, params)
      logging.info("step %d  %s  %s", step, name, "  ".join(f"{key} {value:.3f}" for key, value in metrics.items()))
      found[name] = {f"{name}/{key}": value for key, value in metrics.items()}
    grid = self._grid(params) if self._draws(step, last) else None
    for metrics in found.values():
      writer.scalars(step, metrics)
    if grid is not None:
      writer.image(step, "samples", grid)
    if not self._best or not found:
      return {}
    together = {key: value for metrics in found.values() for key, value in metrics.items()}
    if self._best not in together:
      raise UserError(f"checkpoint.best_metric={self._best} is none of {', '.join(together)}")
    return {self._best: float(processes.from_first(np.float32(together[self._best])))}

  def _evaluates(self, step: int, last: bool) -> bool:
    return bool(self._evals) and (last or step % self._pace.eval_every == 0)

  def _draws(self, step: int, last: bool) -> bool:
    return bool(self._prompts) and (last or step % self._pace.sample_every == 0)

  def _grid(self, params: Params) -> np.ndarray:
    tokens = Tokenizer(self._inference.max_length)(self._prompts)
    noise = self._inference.noise(len(tokens), self._seed)
    images = self._inference.generate(params, tokens, noise)
    return np.asarray(samples.draw_grid(images, self._prompts, columns=8))


def log_start(trainer: Step, data: Data) -> None:
  """Mesh, data and parameters by group, so that a wrong regex shows before the first step."""
  sizes: Mapping[str, Any] = Counter()
  for path, group in trainer.groups.items():
    sizes[group] += math.prod(trainer.shapes[path].shape)
  if jax.process_count() == 1:
    processes.log_place()
  logging.info("mesh %s", dict(trainer.mesh.shape))
  for line in data.describe():
    logging.info("data: %s", line)
  logging.info(
    "objectives %s; parameters: %s",
    ", ".join(trainer.network.objectives),
    ", ".join(f"{group} {number:,}" for group, number in sizes.items()),
  )


def main(argv: Sequence[str]) -> None:
  del argv
  cli.compilation_cache()
  cli.use_all_cores()
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  processes.start()
  train_and_evaluate(FLAGS.config, FLAGS.workdir)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  cli.config_flag()
  processes.define_flags()
  flags.DEFINE_string("workdir", None, "folder of the run: created, or gone on with", required=True)
  cli.run(main)
