"""Times the joint step against its two single tasks, or CLIP's step, in one run on one machine.

The steps take turns, round by round, so that a machine whose speed drifts does so for all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.parallel.chips import find
from diffdis_jax.structs import TrainingBatch
from diffdis_jax.training.flops import turns
from diffdis_jax.training.step import Trainer, abstract_batch

OBJECTIVES = {
  "joint": ("generation", "discrimination"),
  "generation": ("generation",),
  "discrimination": ("discrimination",),
}
OF_CLIP = {"contrastive": ("contrastive",)}


def time_steps(trainers: Mapping[str, Trainer], *, rounds: int) -> dict[str, Any]:
  """Measure the seconds of each step (median and all rounds), floating-point operations by `operations_of`, and ratios.

  Args:
    trainers: the steps, by the names of OBJECTIVES or OF_CLIP, on one mesh, of one batch.
    rounds: timed steps of each.
  """
  first = next(iter(trainers.values()))
  mesh, run = first.mesh, first.run
  batch = random_batch(first)

  states, steps, operations = {}, {}, {}
  for name, step in trainers.items():
    states[name] = step.with_params(step.init_params(jax.random.key(0)))
    # Ahead of time: the compiler's count is of the very program that is timed.
    traced = step.train_step.trace(states[name], batch)
    steps[name] = traced.lower().compile()
    operations[name] = operations_of(traced, steps[name], devices=mesh.size)
    logging.info("%s: compiled, %.1f GFLOP a step", name, operations[name] / 1e9)

  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for index in range(rounds + 1):
    for name, step in steps.items():
      begin = time.perf_counter()
      states[name], metrics = step(states[name], batch)
      jax.block_until_ready(metrics)
      if index:  # the first round warms up
        seconds[name].append(time.perf_counter() - begin)
    logging.info("round %d of %d", index, rounds)

  median = {name: statistics.median(values) for name, values in seconds.items()}
  return dict(
    device=f"{mesh.size} x {jax.devices()[0].device_kind}",
    batch_size=run.batch_size,
    image_size=run.image_size,
    seconds=median,
    rounds=seconds,
    gigaflop={name: value / 1e9 for name, value in operations.items()},
    **(_ratios(median, operations) if "joint" in median else {}),
  )


def operations_of(traced: jax.stages.Traced, compiled: jax.stages.Compiled, *, devices: int) -> float:
  """Count the operations of a call, as the compiler counts those of one device. It takes a loop's body once: that is
  multiplied by the loops' turns."""
  of_device = float((compiled.cost_analysis() or {}).get("flops", float("nan")))
  return of_device * devices * turns(traced.jaxpr)


def random_batch(trainer: Trainer) -> TrainingBatch:
  """Return a random batch of a run: of images, with a view of its own for discrimination where that has one, or of
  latents."""
  rng = np.random.default_rng(0)
  makers = {
    "uint8": lambda shape: rng.integers(0, 256, shape, np.uint8),
    "int32": lambda shape: rng.integers(0, 49406, shape, np.int32),  # tokens of words
    "bfloat16": lambda shape: rng.standard_normal(shape, np.float32).astype(jnp.bfloat16),
  }
  shapes = abstract_batch(trainer.run, trainer.network, trainer.mesh)
  rows = {name: each and makers[each.dtype.name](each.shape) for name, each in vars(shapes).items()}
  # On the devices before the clock starts: the loader's part is measured elsewhere.
  return type(shapes)(**sharding.to_global(rows, trainer.mesh))


def _ratios(seconds: Mapping[str, float], operations: Mapping[str, float]) -> dict[str, float]:
  found = dict(
    joint_over_generation=seconds["joint"] / seconds["generation"],
    joint_over_sum=seconds["joint"] / (seconds["generation"] + seconds["discrimination"]),
    joint_over_generation_flop=operations["joint"] / operations["generation"],
  )
  logging.info(
    "joint / generation %.3f, joint / (generation + discrimination) %.3f, operations joint / generation %.3f",
    *found.values(),
  )
  return found


class Preflighted(NamedTuple):
  """A step by its name in OBJECTIVES, and what `preflight` said of it."""

  name: str
  train: Mapping[str, Any]


def preflighted(
  report: Mapping[str, Any], objectives: Sequence[str], *, batch_size: int, chips: int, kind: str
) -> Preflighted:
  """Return the step that `preflight` was asked about.

  Args:
    report: of preflight's file.
    objectives: of the config.
    batch_size, chips: of what is to be timed.
    kind: of its devices, as JAX names it.

  Raises:
    UserError: no report of a train step of these objectives and batch, on so many of these chips.
  """
  train, name = report.get("train"), next((key for key, own in OBJECTIVES.items() if own == tuple(objectives)), None)
  if name is None or not train:
    raise UserError(
      "--preflight takes what preflight wrote of this config, with objectives generation, discrimination or both"
    )
  # Time does not grow in proportion to either, so that nothing can be scaled to fit; nor to chips' peaks.
  known = find(kind)  # by any of its names
  if (train["images"], train["chips"], train["chip"]) != (batch_size, chips, known.kind if known else kind):
    raise UserError(
      f"--preflight is of {train['images']} images on {train['chips']} x {train['chip']}; here are {batch_size} images"
      f" on {chips} x {kind}"
    )
  return Preflighted(name, train)


def beside_preflight(name: str, train: Mapping[str, Any], measured: float) -> dict[str, Any]:
  """Return the measured seconds of the step `name` over each time that `preflight` gave for it."""
  given = {key: value for key, value in train.items() if key.startswith("seconds") and value}
  for key, value in given.items():
    logging.info("%s: %.4f s, %.2f times preflight's %s", name, measured, measured / value, key)
  return dict(
    step=name, chip=train["chip"], measured=measured, over={key: measured / value for key, value in given.items()}
  )
