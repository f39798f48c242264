"""Trains a config.

  python -m diffdis_jax.train --config=configs/NAME.py[:args] --workdir=DIR [--config.a.b=v ...]

Run again with the same workdir, it goes on from the last checkpoint to the same numbers, on any number of processes and
devices. At SIGTERM it saves and exits with code 75.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax import batches, checkpoint, cli, distributed, evals, sharding, workdir, writers
from diffdis_jax.data import loader
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import samples
from diffdis_jax.inference import Inference
from diffdis_jax.step import Metrics, Step, TrainState, is_running
from diffdis_jax.structs import Preempted, UserError
from diffdis_jax.tree import Params


def train_and_evaluate(config: ConfigDict, path: str) -> None:
  """Trains to `config.num_steps`, from the last checkpoint in the workdir `path` if there is one.

  Raises:
    UserError: bad config, data or workdir, or a loss that is no longer finite.
    Preempted: SIGTERM came; the steps so far are saved.
  """
  check_numbers(config)
  mesh = sharding.make_mesh(**config.mesh)
  stop = distributed.Stop(sharding.batch_sharding(mesh))
  with contextlib.ExitStack() as stack:
    stack.enter_context(stop.listening())  # from the start: building and compiling may take minutes
    trainer = Step(config, mesh)
    batch_type = batches.batch_type(config)
    iterator = batches.make_loader(config, sharding.local_rows(mesh, config.batch_size))
    watch = Watch(config, mesh, stop)
    is_writer = distributed.is_first()
    substitutions = loader.Substitutions()
    log_start(config, trainer)
    if config.init_from and checkpoint.latest_step(path) is None:
      find_initial(config.init_from, trainer)
    workdir.check_config(path, config)
    distributed.check_shared(path)
    distributed.on_first(lambda: stack.enter_context(workdir.Lock(path)))
    workdir.open_for_training(path, config, is_writer=is_writer)
    checkpointer = stack.enter_context(checkpoint.Checkpointer(path, **config.checkpoint))
    state, meta = restore_or_init(config, trainer, checkpointer, iterator)
    batches.check_encoders(config, state.params)
    start = int(state.step)
    writer = writers.make(path, start_step=start, is_writer=is_writer)
    stack.callback(writer.close)
    progress = writers.Progress(start_step=start, num_steps=config.num_steps, batch_size=config.batch_size)
    totals = read_totals(meta)
    if is_writer:
      substitutions.new += np.array(meta.get("substituted", 0))
    if not meta.get("watched", True):
      watch.after_step(start, state, writer, last=start == config.num_steps)

    metrics: Metrics | None = None
    for step in range(start + 1, config.num_steps + 1):
      with progress.waiting_for_data(functools.partial(is_running, metrics)):
        batch = batch_type(**sharding.to_global(substitutions.take(next(iterator)), mesh))
      state, metrics = trainer.train_step(state, batch)
      if step == start + 1:
        jax.block_until_ready(metrics)
        progress.restart(step)
      totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)

      last = step == config.num_steps
      if last or step % config.log_every == 0:
        means = check_finite(totals, step, checkpointer)
        counts = substitutions.report(distributed.over_hosts)
        writer.scalars(step, means | progress.report(step, means) | counts)
        totals = None
      found, preempted, due = {}, stop.agreed(), watch.is_due(step, last=last)
      saves = last or preempted or step % config.save_every == 0
      if due or saves:
        jax.block_until_ready(metrics)  # its time is that of steps
      if due and not preempted:
        try:
          with progress.paused():
            found, due = watch.after_step(step, state, writer, last=last), False
        except Preempted:
          preempted = saves = True
      if saves:
        with progress.paused():
          if totals is not None:
            check_finite(totals, step, checkpointer)
          pending = distributed.over_hosts(substitutions.new).tolist()
          meta = {"totals": write_totals(totals), "substituted": pending, "watched": not due}
          checkpointer.save(step, state, iterator, meta=meta, metrics=found)
      if preempted:
        logging.warning("asked to stop: saving step %d; the same command goes on from there", step)
        raise Preempted


def check_numbers(config: ConfigDict) -> None:
  """Raises UserError for a number of steps below one, or a seed of more than 32 bits."""
  if not 0 <= config.seed < 2**32:
    raise UserError(f"seed is {config.seed}; it must be from 0 to {2**32 - 1}")
  for name in ("num_steps", "log_every", "save_every", "eval_every", "sample_every"):
    if config[name] < 1:
      raise UserError(f"{name} is {config[name]}; it must be at least 1")


def restore_or_init(
  config: ConfigDict, trainer: Step, checkpointer: checkpoint.Checkpointer, iterator: grain.DatasetIterator
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
  params = trainer.init_params(jax.random.key(config.seed))
  if config.init_from:
    params |= load_initial(config.init_from, trainer)
  return trainer.with_params(params), {}


def write_totals(totals: Metrics | None) -> dict[str, list[float]]:
  """Metrics summed since the last report, as JSON, bit for bit."""
  return {name: [float(x) for x in pair] for name, pair in jax.device_get(totals or {}).items()}


def read_totals(meta: Mapping[str, Any]) -> Metrics | None:
  """The inverse of `write_totals`, so that a report over steps before and after a restart is that of one run."""
  saved = meta.get("totals") or {}
  return {name: tuple(np.float32(x) for x in pair) for name, pair in saved.items()} or None


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


def parts_of(paths: Sequence[str]) -> str:
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


class Watch:
  """Evaluations and sample images during training. Everything that can be wrong with them is found at construction."""

  def __init__(self, config: ConfigDict, mesh: Mesh, stop: distributed.Stop):
    self._config = config
    missing = set(config.train_evals) - set(config.evals)
    if missing:
      raise UserError(f"train_evals names {', '.join(sorted(missing))}; evals has {', '.join(config.evals) or 'none'}")
    best = config.checkpoint.best_metric
    if best and best.split("/")[0] not in config.train_evals:
      raise UserError(f"checkpoint.best_metric={best} should begin with one of train_evals, {config.train_evals}")
    self._evals = {name: evals.make(**config.evals[name].to_dict()) for name in config.train_evals}
    self._inference = Inference(config, mesh=mesh, after_batch=stop.raise_if_agreed)
    self._prompts = list(config.sample_prompts) if "generation" in config.objectives else []

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
    best = self._config.checkpoint.best_metric
    if not best or not found:
      return {}
    together = {key: value for metrics in found.values() for key, value in metrics.items()}
    if best not in together:
      raise UserError(f"checkpoint.best_metric={best} is none of {', '.join(together)}")
    return {best: float(distributed.from_first(np.float32(together[best])))}

  def _evaluates(self, step: int, last: bool) -> bool:
    return bool(self._evals) and (last or step % self._config.eval_every == 0)

  def _draws(self, step: int, last: bool) -> bool:
    return bool(self._prompts) and (last or step % self._config.sample_every == 0)

  def _grid(self, params: Params) -> np.ndarray:
    tokens = Tokenizer(self._inference.max_length)(self._prompts)
    noise = self._inference.noise(len(tokens), self._config.seed)
    images = self._inference.generate(params, tokens, noise)
    return np.asarray(samples.draw_grid(images, self._prompts, columns=8))


def log_start(config: ConfigDict, trainer: Step) -> None:
  """Mesh, data and parameters by group, so that a wrong regex shows before the first step."""
  sizes: Mapping[str, Any] = Counter()
  for path, group in trainer.groups.items():
    sizes[group] += math.prod(trainer.shapes[path].shape)
  if jax.process_count() == 1:
    distributed.log_place()
  logging.info("mesh %s", dict(trainer.mesh.shape))
  for line in batches.describe(config):
    logging.info("data: %s", line)
  logging.info(
    "objectives %s; parameters: %s", ", ".join(config.objectives), ", ".join(f"{g} {n:,}" for g, n in sizes.items())
  )


def main(argv: Sequence[str]) -> None:
  del argv
  cli.compilation_cache()
  cli.use_all_cores()
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  distributed.start()
  train_and_evaluate(FLAGS.config, FLAGS.workdir)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  cli.config_flag()
  distributed.define_flags()
  flags.DEFINE_string("workdir", None, "folder of the run: created, or gone on with", required=True)
  cli.run(main)
