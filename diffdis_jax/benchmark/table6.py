"""The paper's Table 6: what training, generation and discrimination cost, of CLIP, Stable Diffusion and DiffDis.

They take turns, round by round, in one process, so that a machine whose speed drifts does so for all of them alike.
Images are synthetic photographs, which are decoded as those of a data set are. The paper's seconds are of machines and
numbers of images that it does not state, so that ratios are what can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pathlib
import statistics
import tarfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from diffdis_jax.data import loader, sources
from diffdis_jax.data.build import batch_type, open_loader
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import Stage, prepare
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import base
from diffdis_jax.inference import Inference
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import TrainingBatch
from diffdis_jax.training import flops
from diffdis_jax.training.step import Trainer

NAMES = {"clip": "CLIP", "stable_diffusion": "Stable Diffusion", "diffdis": "DiffDis"}
SOURCE = 512  # pixels of a synthetic photograph
REPEATS = 10  # of the images: fewer records than some thousands take longer to shuffle, for the way Grain does it
LOADED_STEPS = 3  # of a round, with the loader, at least: as many as it has batches ahead
# Figures from the appendix: hours of training, seconds of generation and of discrimination, zero-shot ImageNet, FID.
PAPER: dict[str, dict[str, float]] = {
  "clip": dict(training=31, discrimination=148, zero_shot=21.1),
  "stable_diffusion": dict(training=32, generation=3530, fid=10.8),
  "diffdis": dict(training=54, generation=3550, discrimination=252, zero_shot=25.92, fid=9.80),
}
# What each figure is over.
BASES = {"training": "stable_diffusion", "generation": "stable_diffusion", "discrimination": "clip"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """One of the three models: its training step, the inference of the same network, and how many images a whole training
  takes."""

  step: Trainer
  inference: Inference
  trained: int


def photo(rng: np.random.Generator, side: int) -> bytes:
  """Return a JPEG of about a photograph's entropy: soft shapes, texture, grain."""
  noise = lambda n: Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8))
  layer = lambda n: np.asarray(noise(n).resize((side, side), Image.Resampling.BICUBIC), np.float32)
  # Size and time of decoding follow from entropy: plain colours would be decoded too fast, pure noise too slowly.
  pixels = 0.75 * layer(12) + 0.2 * layer(side // 8) + rng.normal(0, 4, (side, side, 3))
  file = io.BytesIO()
  Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
  return file.getvalue()


def write_tar(path: pathlib.Path, images: list[bytes], count: int, seed: int) -> None:
  """Write `count` pairs of these images, as img2dataset packs them, each with a caption of its own."""
  rng = np.random.default_rng(seed)
  words = "a photo of the red old small house with two people near river and green trees in winter light".split()
  with tarfile.open(path, "w") as tar:
    for i in range(count):
      caption = " ".join(rng.choice(words, rng.integers(6, 14)))
      for ending, data in (("jpg", images[i % len(images)]), ("txt", caption.encode()), ("json", b"{}")):
        member = tarfile.TarInfo(f"{i:06d}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def write_photos(folder: pathlib.Path, images: int) -> pathlib.Path:
  """Write a new folder with one tar of photographs, each REPEATS times."""
  raw, rng = folder / "raw", np.random.default_rng(0)
  raw.mkdir()
  write_tar(raw / "train-00000.tar", [photo(rng, SOURCE) for _ in range(images)], REPEATS * images, seed=0)
  return raw


def time_table6(
  models: Mapping[str, Model], folder: pathlib.Path, *, images: int, rounds: int, generated: int, classified: int
) -> dict[str, Any]:
  """Time everything, and return seconds (medians and all rounds), operations, and what follows of them for the paper's
  numbers.

  Args:
    models: by the keys of NAMES.
    folder: empty; the images are written there.
    images: distinct ones of 512 px.
    rounds: timed ones; one more warms up.
    generated, classified: images of the table's columns.
  """
  prepared = _write_images(folder, images, max(model.step.run.image_size for model in models.values()))
  timed = {name: _Timed(model, prepared) for name, model in models.items()}
  seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in each.ways} for name, each in timed.items()}
  for index in range(rounds + 1):
    for name, each in timed.items():
      for way, once in each.ways.items():
        if way == "training":
          each.use_up()
        begin = time.perf_counter()
        count = once()
        if index:
          seconds[name][way].append((time.perf_counter() - begin) / count)
    logging.info("round %d of %d", index, rounds)

  mesh, found = models["clip"].step.mesh, {}
  for name, model in models.items():
    median = {way: statistics.median(values) for way, values in seconds[name].items()}
    found[name] = dict(
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
    models=found,
    ratios=ratios({name: each["extrapolated"] for name, each in found.items()}),
    ratios_of_operations=ratios({name: each["gigaflop"] for name, each in found.items()}),
  )


def _write_images(folder: pathlib.Path, images: int, image_size: int) -> str:
  """Write JPEGs as prepare_data stores them for this image size, a little larger than they are seen. Return their
  folder."""
  raw = write_photos(folder, images)
  prepare(parts.tars(raw), folder / "pairs", make_stage=functools.partial(Stage, short_side=image_size * 9 // 8))
  return str(folder / "pairs")


class _Timed:
  """A model with its state and data. `ways`: name -> a function that does something once and returns for how many
  images."""

  def __init__(self, model: Model, prepared: str):
    self._model, run = model, model.step.run
    data = dataclasses.replace(run.data, source={"name": "pairs", "path": prepared}, mixture={})
    self._batches = open_loader(dataclasses.replace(run, data=data, seed=0))
    self._substitutions = loader.Substitutions()
    # One batch for all steps without the loader.
    self._batch = self._draw()
    self._state = model.step.with_params(model.step.init_params(jax.random.key(0)))
    self._source = sources.open_source(name="pairs", path=prepared, image_size=run.image_size)
    # A small --images has fewer images than a batch.
    self._places = np.arange(run.batch_size) % len(self._source)
    self._tokens = Tokenizer(data.max_length)([f"a photo of {i} houses" for i in range(run.batch_size)])
    self.ways: dict[str, Callable[[], int]] = dict(training_step=self._train, training=self._train_with_loader)
    if run.task.generates:
      self._noise = model.inference.noise(run.batch_size, seed=0)
      self.ways["generation"] = self._generate
    if run.task.aligned:
      self.ways["discrimination"] = self._discriminate

  def _draw(self) -> TrainingBatch:
    batch = self._substitutions.take(next(self._batches))
    return batch_type(self._model.step.run.data)(**sharding.to_global(batch, self._model.step.mesh))

  def _step(self, batch: TrainingBatch) -> None:
    self._state, _ = self._model.step.train_step(self._state, batch)

  def _train(self) -> int:
    self._step(self._batch)
    jax.block_until_ready(self._state)
    return self._model.step.run.batch_size

  def use_up(self) -> None:
    """Use up what the loader has read while others were timed, which would cost nothing; then take steps, from whose
    end on it is as far ahead as in a long training."""
    for _ in range(self._loaded_steps):
      self._draw()
    self._train_with_loader()

  def _train_with_loader(self) -> int:
    for _ in range(self._loaded_steps):  # as train does: a batch is loaded while the step before it runs
      self._step(self._draw())
    # Once at the end, since a wait after each step would keep the loader from running beside it.
    jax.block_until_ready(self._state)
    return self._loaded_steps * self._model.step.run.batch_size

  @property
  def _loaded_steps(self) -> int:
    return max(LOADED_STEPS, self._model.step.run.data.loader.prefetch)

  def _generate(self) -> int:
    self._model.inference.generate(self._state.params, self._tokens, self._noise)
    return len(self._tokens)

  def _discriminate(self) -> int:
    base.embed_images(self._model.inference, self._state.params, self._source, self._places, seed=0)
    return len(self._places)


def _operations(model: Model) -> dict[str, float]:
  """Count the operations of matrix products and convolutions, 1e9 an image; nothing that is computed twice counts
  twice."""
  traced = dict(training=flops.trace_train(model.step))
  # By tracing: what the compiler counts includes what rematerialisation computes again.
  task = model.step.run.task
  for way, is_done in (("generation", task.generates), ("discrimination", task.aligned)):
    if is_done:
      traced[way] = flops.trace_inference(way, model.inference)
  return {way: program.operations / program.rows / 1e9 for way, program in traced.items()}


def _extrapolated(seconds: Mapping[str, float], trained: int, generated: int, classified: int) -> dict[str, float]:
  """Return the table's columns from seconds an image: hours of training, with the loader; seconds of the others."""
  counts = dict(training=trained / 3600, generation=generated, discrimination=classified)
  return {way: count * seconds[way] for way, count in counts.items() if way in seconds}


def ratios(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Divide DiffDis's figures by what each column is compared with."""
  return {f"{way}_over_{over}": values["diffdis"][way] / values[over][way] for way, over in BASES.items()}


def markdown(results: Mapping[str, Any]) -> str:
  """Return the paper's table with ours beside it. Accuracy and FID are no part of what is timed here."""
  rows = [
    "| | training | operations of a step, an image | generation | discrimination | zero-shot ImageNet | FID |",
    "|---|---|---|---|---|---|---|",
  ]
  own = {name: each["extrapolated"] for name, each in results["models"].items()}
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
  """Return a model's cells of the three columns of times, each with its ratio to the column's base; "" for what it
  lacks."""
  cells = []
  for way, unit in (("training", "h"), ("generation", "s"), ("discrimination", "s")):
    value = values[name].get(way)
    cells.append("" if value is None else f"{value:,.4g} {unit} ({value / values[BASES[way]][way]:.2f})")
  return cells
