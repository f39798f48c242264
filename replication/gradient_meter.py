"""Measure the gradients of L_IG and L_ITA in each block of the network: their norms and their cosine.

python -m replication.gradient_meter --workdir=RUN --batches=4 --out=gradients.json
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float

from diffdis_jax import config
from diffdis_jax.common import cli, files
from diffdis_jax.common.params import Params
from diffdis_jax.data.build import batch_type, open_loader
from diffdis_jax.data.loader import Substitutions
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.run import restore
from diffdis_jax.structs import TrainingBatch, TrainState
from diffdis_jax.training.step import Trainer

FLAGS = flags.FLAGS
TASKS = ("generation", "discrimination")
# The paths of a block's parameters, and the tasks whose loss reaches it. Both losses reach all of `shared`.
BLOCKS = {
  "down": (r"^unet\.(conv_in|down)\.", TASKS),
  "middle": (r"^unet\.middle\.", TASKS),
  "up": (r"^unet\.(up|norm_out|conv_out)\.", TASKS[:1]),
  "text_encoder": (r"^text_encoder\.", TASKS),
  "fusion": (r"^text_stream\.", TASKS[1:]),
  "shared": (r"^unet\.(conv_in|time|down|middle)\.|^text_encoder\.", TASKS),
}
LEAST_NORM = 1e-30


def compiled(trainer: Trainer) -> Callable[[TrainState, TrainingBatch], dict[str, Float[Array, ""]]]:
  """Return `compare` as one program for the trainer's mesh."""
  traced = trainer.network.tracing(trainer.mesh)(functools.partial(compare, trainer))
  return jax.jit(traced, in_shardings=(trainer.state_shardings, sharding.batch_sharding(trainer.mesh)))


def compare(trainer: Trainer, state: TrainState, batch: TrainingBatch) -> dict[str, Float[Array, ""]]:
  """Return the norm of each task's gradient in each block, their cosine, and the ratio of L_ITA's norm to L_IG's.

  L_IG has its weights, and L_ITA is taken before λ.
  """
  loss = dataclasses.replace(trainer.run.loss, ita_weight=1.0)
  gradients: dict[str, Params] = {}
  for task in TASKS:
    single = copy.copy(trainer)  # the same state and parameters, but the loss of one task
    single.run = dataclasses.replace(trainer.run, loss=loss)
    single.network = dataclasses.replace(trainer.network, objectives=(task,))
    gradients[task] = single.gradient(state, batch).gradient

  metrics: dict[str, Float[Array, ""]] = {}
  for block, (pattern, tasks) in BLOCKS.items():
    paths = [path for path in trainer.trainable if re.search(pattern, path)]
    if not paths:
      continue
    norms = {task: jnp.sqrt(inner_product(gradients[task], gradients[task], paths)) for task in tasks}
    metrics |= {f"grad_norm_{task}_{block}": norm for task, norm in norms.items()}
    if len(tasks) == 2:
      generation, discrimination = (jnp.maximum(norms[task], LEAST_NORM) for task in TASKS)
      product = inner_product(gradients["generation"], gradients["discrimination"], paths)
      metrics[f"grad_cosine_{block}"] = product / generation / discrimination
      metrics[f"grad_ratio_{block}"] = discrimination / generation
  return metrics


def inner_product(first: Params, second: Params, paths: list[str]) -> Float[Array, ""]:
  """Return ⟨first, second⟩ over these parameters."""
  return sum((jnp.sum(first[path] * second[path]) for path in paths), start=jnp.zeros(()))


def measure(workdir: str, batches: int) -> dict[str, float]:
  """Return the mean over the first batches of a run's data, at its newest checkpoint."""
  run = config.load(workdir)
  if {*run.objectives} != {*TASKS}:
    raise UserError(f"{workdir} was trained for {', '.join(run.objectives)}; the meter compares both tasks")
  trainer = Trainer(run, sharding.make_mesh(**vars(run.mesh)))
  params = restore.restore_params(workdir, ema=False)
  state, step, measured = trainer.with_params(params), compiled(trainer), []
  substitutions = Substitutions()
  loader = open_loader(run, rows=sharding.local_rows(trainer.mesh, run.batch_size))
  for _ in range(batches):
    rows = substitutions.take(next(loader))
    batch = batch_type(run.data)(**sharding.to_global(rows, trainer.mesh))
    measured.append(jax.device_get(step(state, batch)))
  loader.close()
  return {name: float(np.mean([batch_figures[name] for batch_figures in measured])) for name in measured[0]}


def main(argv: object) -> None:
  cli.use_all_cores()
  files.check_out(FLAGS.out)
  files.write_out(FLAGS.out, files.as_json(measure(FLAGS.workdir, FLAGS.batches)))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "a run of both tasks", required=True)
  flags.DEFINE_integer("batches", 4, "how many batches to average over", lower_bound=1)
  flags.DEFINE_string("out", None, "JSON file to write", required=True)
  cli.run(main)
