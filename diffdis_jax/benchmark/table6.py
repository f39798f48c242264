"""Measure the paper's Table 6: the cost of training, generation and discrimination for CLIP, Stable Diffusion and
DiffDis.

The models take turns, round by round, in one process, so that a drift of the machine's speed affects all alike. Images
are random and in memory. The paper does not state its machines and numbers of images, so only ratios can be compared.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.inference import Inference
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import flops
from diffdis_jax.structs import TrainingBatch
from diffdis_jax.training.step import Trainer, abstract_batch

NAMES = {"clip": "CLIP", "stable_diffusion": "Stable Diffusion", "diffdis": "DiffDis"}
# The appendix's numbers: hours of training, seconds of generation and discrimination, zero-shot ImageNet, FID.
PAPER: dict[str, dict[str, float]] = {
  "clip": dict(training=31, discrimination=148, zero_shot=21.1),
  "stable_diffusion": dict(training=32, generation=3530, fid=10.8),
  "diffdis": dict(training=54, generation=3550, discrimination=252, zero_shot=25.92, fid=9.80),
}
# The model that each column's ratios are relative to.
BASES = {"training": "stable_diffusion", "generation": "stable_diffusion", "discrimination": "clip"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """One of the three models: its training step, the inference of the same network, and the images of its training."""

  step: Trainer
  inference: Inference
  trained: int


def time_table6(models: Mapping[str, Model], *, rounds: int, generated: int, classified: int) -> dict[str, Any]:
  """Time everything; return seconds (medians and all rounds), operations, and estimates for the paper's numbers of
  images.

  Args:
    models: the models by the keys of NAMES.
    rounds: number of timed rounds; one more warms up.
    generated, classified: numbers of images in the table's columns.
  """
  ways = {name: ways_of(model) for name, model in models.items()}
  seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in own} for name, own in ways.items()}
  for index in range(rounds + 1):
    for name, own in ways.items():
      for way, run_once in own.items():
        begin = time.perf_counter()
        run_once()
        if index:
          seconds[name][way].append((time.perf_counter() - begin) / models[name].step.run.batch_size)
    logging.info("round %d of %d", index, rounds)

  mesh, measured = models["clip"].step.mesh, {}
  for name, model in models.items():
    median = {way: statistics.median(values) for way, values in seconds[name].items()}
    measured[name] = dict(
      image_size=model.step.run.image_size,
      parameters=sum(math.prod(leaf.shape) for leaf in model.step.shapes.values()),
      batch_size=model.step.run.batch_size,
      seconds=median,
      rounds=seconds[name],
      gigaflop=_operations(model),
      extrapolated=_extrapolated(median, model.trained, generated, classified),
    )
  return dict(
    device=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    trained={name: model.trained for name, model in models.items()},
    generated=generated,
    classified=classified,
    generation_steps=models["diffdis"].inference.sampling.generation_steps,
    models=measured,
    ratios=ratios({name: model["extrapolated"] for name, model in measured.items()}),
    ratios_of_operations=ratios({name: model["gigaflop"] for name, model in measured.items()}),
  )


def ways_of(model: Model) -> dict[str, Callable[[], None]]:
  """Return, by name, the functions that are timed; each does its work once for a batch."""
  trainer, inference, run = model.step, model.inference, model.step.run
  batch, states = random_batch(trainer), [trainer.with_params(trainer.init_params(jax.random.key(0)))]
  tokens = Tokenizer(run.data.max_length)([f"a photo of {i} houses" for i in range(run.batch_size)])
  images = np.random.default_rng(1).integers(0, 256, (run.batch_size, run.image_size, run.image_size, 3), np.uint8)

  def train() -> None:
    states[0], metrics = trainer.train_step(states[0], batch)
    jax.block_until_ready(metrics)

  def generate() -> None:
    inference.generate(states[0].params, tokens, inference.noise(run.batch_size, seed=0))

  def discriminate() -> None:
    inference.embed_images(states[0].params, images, seed=0)

  ways: dict[str, Callable[[], None]] = {"training": train}
  ways |= {"generation": generate} if run.task.generates else {}
  return ways | ({"discrimination": discriminate} if run.task.aligned else {})


def random_batch(trainer: Trainer) -> TrainingBatch:
  """Return a random batch as a run has it: images, with a second view if discrimination has its own, or latents."""
  rng = np.random.default_rng(0)
  makers = {
    "uint8": lambda shape: rng.integers(0, 256, shape, np.uint8),
    "int32": lambda shape: rng.integers(0, 49406, shape, np.int32),  # word tokens
    "bfloat16": lambda shape: rng.standard_normal(shape, np.float32).astype(jnp.bfloat16),
  }
  shapes = abstract_batch(trainer.run, trainer.network, trainer.mesh)
  rows = {name: leaf and makers[leaf.dtype.name](leaf.shape) for name, leaf in vars(shapes).items()}
  # Put it on the devices before the clock starts: the loader is measured elsewhere.
  return type(shapes)(**sharding.to_global(rows, trainer.mesh))


def _operations(model: Model) -> dict[str, float]:
  """Count operations of matrix products and convolutions, in 1e9 an image, without those that are computed twice."""
  traced = dict(training=flops.trace_train(model.step))
  # Count by tracing: the compiler's count includes what rematerialisation computes again.
  task = model.step.run.task
  for way, is_done in (("generation", task.generates), ("discrimination", task.aligned)):
    if is_done:
      traced[way] = flops.trace_inference(way, model.inference)
  return {way: program.operations / program.rows / 1e9 for way, program in traced.items()}


def _extrapolated(seconds: Mapping[str, float], trained: int, generated: int, classified: int) -> dict[str, float]:
  """Return the table's columns from seconds per image: hours of training, seconds of the others."""
  counts = dict(training=trained / 3600, generation=generated, discrimination=classified)
  return {way: count * seconds[way] for way, count in counts.items() if way in seconds}


def ratios(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Return the ratios of DiffDis's values to the model that each column is compared with."""
  return {f"{way}_over_{over}": values["diffdis"][way] / values[over][way] for way, over in BASES.items()}


def markdown(results: Mapping[str, Any]) -> str:
  """Return the paper's table beside ours. Accuracy and FID are not measured here."""
  rows = [
    "| | training | operations of a step, an image | generation | discrimination | zero-shot ImageNet | FID |",
    "|---|---|---|---|---|---|---|",
  ]
  own = {name: model["extrapolated"] for name, model in results["models"].items()}
  for name, title in NAMES.items():
    training, *others = _times(name, PAPER)
    quality = f"{PAPER[name]['zero_shot']} %" if "zero_shot" in PAPER[name] else "", str(PAPER[name].get("fid", ""))
    of_paper = "CLIP-L/14" if name == "clip" else title
    rows.append(f"| {of_paper}, paper | {' | '.join([training, '', *others, *quality])} |")
    training, *others = _times(name, own)
    model = results["models"][name]
    size = f"{model['parameters'] / 1e6:,.1f} M parameters, {model['image_size']} px"
    gigaflop = f"{model['gigaflop']['training']:,.4g} GFLOP"
    rows.append(f"| {title}, here: {size} | {' | '.join([training, gigaflop, *others, '', ''])} |")
  trained = ", ".join(f"{title} {results['trained'][name]:,}" for name, title in NAMES.items())
  note = (
    f"In brackets: over Stable Diffusion, of discrimination over CLIP. Here: {results['device']}, extrapolated from"
    f" medians an image to trainings of {trained} images, {results['generated']:,} generated and"
    f" {results['classified']:,} classified ones; {results['generation_steps']} sampling steps. The paper states"
    " neither its machine nor how many images."
  )
  return "\n".join([*rows, "", note, ""])


def _times(name: str, values: Mapping[str, Mapping[str, float]]) -> list[str]:
  """Return a model's cells for the three columns of times, each with its ratio to the column's base; "" for none."""
  cells = []
  for way, unit in (("training", "h"), ("generation", "s"), ("discrimination", "s")):
    value = values[name].get(way)
    cells.append("" if value is None else f"{value:,.4g} {unit} ({value / values[BASES[way]][way]:.2f})")
  return cells
