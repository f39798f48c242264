"""Run evaluations and generate sample images while a run trains."""

from __future__ import annotations

import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import UInt8

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import samples
from diffdis_jax.evals import tasks as evals
from diffdis_jax.inference import Inference
from diffdis_jax.parallel import batches, processes
from diffdis_jax.run import watch
from diffdis_jax.run.writers import Writer
from diffdis_jax.structs import TrainState
from diffdis_jax.training.step import Trainer


def make_inference(trainer: Trainer, stop: processes.PreemptionHandler, dog: watch.Watchdog) -> Inference:
  """Return the inference of the network in training."""

  def after_batch() -> None:
    dog.alive()
    stop.raise_if_agreed()

  run, mesh = trainer.run, trainer.mesh
  inference = Inference(
    trainer.network, run.inference, mesh=mesh, batch_size=rows_at_a_time(run, mesh), after_batch=after_batch
  )
  inference.duplicate_captions = run.loss.duplicate_captions  # so that the held-out loss is that of the training
  return inference


def rows_at_a_time(run: Run, mesh: Mesh) -> int:
  """Return the number of rows of a call of evaluations and samples: at most that of a microbatch, since they must fit
  into memory beside the state, but at least 64 if a step is not split."""
  of_step = run.batch_size // run.optim.accumulate
  if run.optim.accumulate == 1:
    of_step = max(of_step, batches.ROWS)
  return min(batches.rows_of_a_call(mesh), of_step)


class UnknownMetric(UserError):
  """The error that `checkpoint.best_metric` names no metric. All processes raise it, unlike errors in data."""


class Evaluator:
  """Run the evaluations and generate the sample images of a run.

  Raises:
    UserError: an evaluation does not fit the run's objectives, measures a finished checkpoint, or has wrong settings or
      data.
  """

  def __init__(self, run: Run, inference: Inference):
    for name in run.train_evals:
      evals.check_objectives(f"train_evals has {name}", run.evals[name]["task"], run.objectives)
    self._run, self._inference = run, inference
    self._evals = {name: evals.create(**run.evals[name]) for name in run.train_evals}
    self._prompts = list(run.sample_prompts) if run.task.generates else []

  def is_due(self, step: int, *, last: bool) -> bool:
    """Return whether there is something to do after this step."""
    return self._evaluates(step, last) or self._draws(step, last)

  def after_step(self, step: int, state: TrainState, writer: Writer, *, last: bool) -> dict[str, float]:
    """Do what is due, write the results, and return the metrics, the same on every process.

    Raises:
      Preempted: the processes stop meanwhile; nothing was written.
      UnknownMetric: `checkpoint.best_metric` is none of the metrics.
      UserError: data cannot be used.
    """
    params = {**state.params, **state.ema}  # the averages, as in evaluate and generate by default
    by_evaluation = {}
    for name, evaluation in self._evals.items() if self._evaluates(step, last) else ():
      metrics = evaluation.run(self._inference, params)
      logging.info("step %d  %s  %s", step, name, "  ".join(f"{key} {value:.3f}" for key, value in metrics.items()))
      by_evaluation[name] = {f"{name}/{key}": value for key, value in metrics.items()}
    grid = self._grid(params) if self._draws(step, last) else None
    # Written when all is measured: after a stop meanwhile, the restart repeats all evaluations of this step.
    for metrics in by_evaluation.values():
      writer.scalars(step, metrics)
    if grid is not None:
      writer.image(step, "samples", grid)
    best = self._run.checkpoint.best_metric
    if not best or not by_evaluation:
      return {}
    together = {key: value for metrics in by_evaluation.values() for key, value in metrics.items()}
    if best not in together:
      raise UnknownMetric(f"checkpoint.best_metric={best} is none of {', '.join(together)}")
    # The value of process 0: with different rounding, processes might keep different checkpoints.
    return {best: float(processes.from_first(np.float32(together[best])))}

  def _evaluates(self, step: int, last: bool) -> bool:
    return bool(self._evals) and (last or step % self._run.eval_every == 0)

  def _draws(self, step: int, last: bool) -> bool:
    return bool(self._prompts) and (last or step % self._run.sample_every == 0)

  def _grid(self, params: Params) -> UInt8[np.ndarray, "h w 3"]:
    tokens = Tokenizer(self._inference.max_length)(self._prompts)
    # The same noise each time, so that grids differ only by training.
    noise = self._inference.noise(len(tokens), self._run.seed)
    images = self._inference.generate(params, tokens, noise)
    return np.asarray(samples.draw_grid(images, self._prompts, columns=8))
