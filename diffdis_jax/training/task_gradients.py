"""How the two tasks pull at the network while it trains: cosine and norms of L_IG's and L_ITA's gradients, by block.

A program beside the training step, which stays as it is. It runs before a step whose metrics are logged, on that step's
parameters, batch and noise, and takes a gradient of each loss by itself, in the step's microbatches.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffdis_jax.common.params import Params
from diffdis_jax.config.objectives import Objectives
from diffdis_jax.parallel import programs, sharding
from diffdis_jax.structs import TrainingBatch, TrainState
from diffdis_jax.training.step import Trainer

TASKS = ("generation", "discrimination")
# Block -> its parameters' paths, and which of the losses reach it. `shared` is all that both reach.
BLOCKS = {
  "down": (r"^unet\.(conv_in|down)\.", TASKS),
  "middle": (r"^unet\.middle\.", TASKS),
  "up": (r"^unet\.(up|norm_out|conv_out)\.", TASKS[:1]),
  "text_encoder": (r"^text_encoder\.", TASKS),
  "fusion": (r"^text_stream\.", TASKS[1:]),
  "shared": (r"^unet\.(conv_in|time|down|middle)\.|^text_encoder\.", TASKS),
}
_LEAST = 1e-30


def compiled_beside(trainer: Trainer, batch: TrainingBatch) -> programs.AheadOfTime:
  """(state, batch) -> name of a metric -> its value, f32[]; nothing is donated. `batch`: its shapes."""
  compare = jax.jit(
    trainer.network.traced_for(trainer.mesh, lambda state, batch: compared(trainer, state, batch)),
    in_shardings=(trainer.state_shardings, sharding.batch_sharding(trainer.mesh)),
  )
  return programs.AheadOfTime("the gradients of both tasks", compare, trainer.abstract_state, batch)


def compared(trainer: Trainer, state: TrainState, batch: TrainingBatch) -> dict[str, Float[Array, ""]]:
  """Of each block with trained parameters the norms of the gradients that reach it; where both do, their cosine, and
  the norm of L_ITA's over that of L_IG's.

  Of L_IG with its weights, and of L_ITA before λ.
  """
  # Other terms of the loss are no task's.
  loss = dataclasses.replace(trainer.run.loss, ita_weight=1.0, dispersive_weight=0.0)
  run = dataclasses.replace(trainer.run, loss=loss)
  gradients: dict[str, Params] = {}
  for task in TASKS:
    network = dataclasses.replace(trainer.network, objectives=Objectives((task,)))
    gradients[task] = trainer.gradient(state, batch, network=network, run=run).gradient

  found: dict[str, Float[Array, ""]] = {}
  for block, (pattern, tasks) in BLOCKS.items():
    paths = [path for path in trainer.trainable if re.search(pattern, path)]
    if not paths:
      continue
    norms = {task: jnp.sqrt(_product(gradients[task], gradients[task], paths)) for task in tasks}
    found |= {f"grad_norm_{task}_{block}": norm for task, norm in norms.items()}
    if len(tasks) > 1:
      of_ig, of_ita = (jnp.maximum(norm, _LEAST) for norm in norms.values())
      cosine = _product(gradients["generation"], gradients["discrimination"], paths) / of_ig / of_ita
      found[f"grad_cosine_{block}"] = cosine
      found[f"grad_ratio_{block}"] = of_ita / of_ig
  return found


def _product(first: Params, second: Params, paths: list[str]) -> Float[Array, ""]:
  """⟨first, second⟩ over these parameters, f32."""
  return sum((jnp.sum(first[path] * second[path]) for path in paths), start=jnp.zeros(()))
