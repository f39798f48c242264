"""Measure the way from tars to batches against fixed bars, such as the bare cost of the same work.

  python -m tests.benchmark.data_bars OUT.json [FOLDER]

It prepares synthetic photographs in a temporary folder under FOLDER, reads them, and trains `diffdis_cc3m:runlocal`
on them. What is compared takes turns, round by round. It takes some minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from PIL import Image

from configs import diffdis_cc3m
from diffdis_jax.common import files
from diffdis_jax.config.data import Augmentation, Loading
from diffdis_jax.config.model import TextEncoderSize
from diffdis_jax.config.run import Run
from diffdis_jax.data import image_files, loader, sources
from diffdis_jax.data.build import batch_type, open_loader
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import Stage, prepare
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import resize
from diffdis_jax.parallel import sharding
from diffdis_jax.training.metrics import Meters
from diffdis_jax.training.step import Trainer

SOURCE, SHORT_SIDE, CROP = 512, 288, 256  # in pixels; SHORT_SIDE is how records are stored
IMAGES, REPEATS = 200, 10  # Grain takes longer to shuffle fewer records than a few thousand
BATCH, ROUNDS = 16, 15
BATCHES = {"source": 20, "short_side": 40, "bare": 20}  # batches a round, so that all rounds take about as long
AHEAD = 2  # batches that the loader reads ahead; once read, they cost nothing
ANSWER = 0.05  # seconds until a bucket answers
AT_LEAST = {
  "loader_over_bare": 0.9,
  "short_side_over_source": 2.5,
  "prepare_kept_per_core": 400.0,
  "prepare_reencoded_per_core": 120.0,
  "distant_images_per_second": 1340.0,
}
AT_MOST = {"data_wait": 0.02}


def main(out: str, scratch: str | None = None) -> None:
  """Write every measured value, the bars, and whether each bar is met."""
  logging.set_verbosity(logging.INFO)
  run = Run.of(diffdis_cc3m.get_config("runlocal"))
  trainer = Trainer(run, sharding.make_mesh(**vars(run.mesh)))
  with tempfile.TemporaryDirectory(dir=scratch) as name:
    folder = pathlib.Path(name)
    figures = prepare_speed(write_photographs(folder / "raw"), folder) | loader_speed(folder)
    figures |= data_wait(trainer, folder / "reencoded") | distant(Loading(**diffdis_cc3m.get_config().data.loader))
  met = {name: figures[name] >= bar for name, bar in AT_LEAST.items()}
  met |= {name: figures[name] <= bar for name, bar in AT_MOST.items()}
  for name, bar in (AT_LEAST | AT_MOST).items():
    logging.info("%s %.3g, bar %g: %s", name, figures[name], bar, "met" if met[name] else "missed")
  files.write_out(out, files.as_json({**figures, "bars": AT_LEAST | AT_MOST, "met": met}))


def photograph(rng: np.random.Generator, side: int) -> bytes:
  """Return a JPEG of about a photograph's entropy: soft shapes, texture, grain."""
  noise = lambda n: Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8))
  layer = lambda n: np.asarray(noise(n).resize((side, side), Image.Resampling.BICUBIC), np.float32)
  # Size and time of decoding follow from entropy: plain colours would be decoded too fast, pure noise too slowly.
  pixels = 0.75 * layer(12) + 0.2 * layer(side // 8) + rng.normal(0, 4, (side, side, 3))
  file = io.BytesIO()
  Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
  return file.getvalue()


def write_photographs(folder: pathlib.Path) -> pathlib.Path:
  """Write a tar of photographs as img2dataset packs them, each REPEATS times with another caption, and return its
  folder."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  images = [photograph(rng, SOURCE) for _ in range(IMAGES)]
  words = "a photo of the red old small house with two people near river and green trees in winter light".split()
  with tarfile.open(folder / "train-00000.tar", "w") as tar:
    for i in range(REPEATS * IMAGES):
      caption = " ".join(rng.choice(words, rng.integers(6, 14)))
      for ending, content in (("jpg", images[i % IMAGES]), ("txt", caption.encode()), ("json", b"{}")):
        member = tarfile.TarInfo(f"{i:06d}.{ending}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  return folder


def prepare_speed(raw: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
  """Return pairs per second of CPU time in one process, for JPEGs that are stored as they are and for smaller ones."""
  speeds = {}
  for name, short_side in (("kept", None), ("reencoded", SHORT_SIDE)):
    # Take CPU time: wall time would depend on what else this machine does.
    begin = time.process_time()
    prepare(parts.tars(raw), folder / name, make_stage=functools.partial(Stage, short_side=short_side))
    speeds[f"prepare_{name}_per_core"] = REPEATS * IMAGES / (time.process_time() - begin)
  return speeds


def make_loader(source: Any, loading: Loading, *, rows: int = BATCH, side: int = CROP) -> grain.DatasetIterator:
  how: dict[str, Any] = dict(tokenizer=Tokenizer(TextEncoderSize().max_length), seed=0, loading=loading)
  augmentation = Augmentation(crop="random", flip=True)
  return loader.train_loader(source, batch_size=rows, image_size=side, augmentation=augmentation, **how)


def bare_loop(source: sources.Source) -> Iterator[None]:
  """Decode and crop the same bytes with the same library, a batch at a time, and do nothing else."""
  rng = np.random.default_rng(0)
  stored = [source[i]["image"] for i in range(len(source))]
  while True:
    for start in range(0, len(stored) - BATCH + 1, BATCH):
      for content in stored[start : start + BATCH]:
        with image_files.open_image(content) as image:
          image.draft(None, (CROP, CROP))
          np.asarray(resize(image, CROP, place=rng.random()))
      yield


def loader_speed(folder: pathlib.Path) -> dict[str, Any]:
  """Return images per second of the loader with one thread, for each kind of records, and of the bare loop."""
  kept, smaller = (
    sources.open_source(name="pairs", path=folder / name, image_size=CROP) for name in ("kept", "reencoded")
  )
  one_thread = Loading(num_threads=1, prefetch=AHEAD)
  iterators = {"source": make_loader(kept, one_thread), "short_side": make_loader(smaller, one_thread)}
  iterators["bare"] = bare_loop(kept)
  seconds: dict[str, list[float]] = {name: [] for name in iterators}
  for index in range(ROUNDS + 1):
    for name, iterator in iterators.items():
      for _ in range(AHEAD):  # otherwise, batches read before the clock starts would count
        next(iterator)
      begin = time.perf_counter()
      for _ in range(BATCHES[name]):
        next(iterator)
      took = time.perf_counter() - begin
      if index:  # the first round warms up
        seconds[name].append(took / (BATCHES[name] * BATCH))
      time.sleep(AHEAD * took / BATCHES[name])  # let the loader read ahead now, not while the next one is timed
  # The median ignores a round that something else disturbed.
  rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
  ratios = {"loader_over_bare": rates["source"] / rates["bare"]}
  return {"images_per_second": rates, **ratios, "short_side_over_source": rates["short_side"] / rates["source"]}


def data_wait(trainer: Trainer, prepared: pathlib.Path, *, steps: int = 30) -> dict[str, float]:
  """Return the share of a small model's steps that waits for the records in `prepared`."""
  source = {"name": "pairs", "path": str(prepared)}
  run = dataclasses.replace(trainer.run, data=dataclasses.replace(trainer.run.data, source=source, mixture={}), seed=0)
  state = trainer.with_params(trainer.init_params(jax.random.key(0)))
  iterator, substitutions = open_loader(run), loader.Substitutions()
  draw = lambda: batch_type(run.data)(**sharding.to_global(substitutions.take(next(iterator)), trainer.mesh))
  # The first step is not timed, since it compiles. Nor are the steps on batches that were read ahead meanwhile: a long
  # run has no such batches if its steps wait for data, and reads them again if they do not.
  state, metrics = trainer.train_step(state, draw())
  for _ in range(run.data.loader.prefetch):
    draw()
  for _ in range(run.data.loader.prefetch):
    state, metrics = trainer.train_step(state, draw())
  jax.block_until_ready(metrics)
  meters = Meters(run, start_step=0, meta={})
  for step in range(1, steps + 2):  # as in train: a batch is loaded while the previous step runs
    rows = sharding.to_global(meters.next_rows(iterator), trainer.mesh)
    state, metrics = trainer.train_step(state, batch_type(run.data)(**rows))
    meters.add(step, metrics)  # the clock starts at the first step
  report = meters.report(steps + 1)
  return {"data_wait": report["data_wait"], "small_model_steps_per_second": report["steps_per_sec"]}


class Distant:
  """Small records, each of which takes ANSWER seconds to arrive. Waiting needs no CPU."""

  def __len__(self) -> int:
    return 100_000

  def __getitem__(self, index: int) -> dict[str, Any]:
    time.sleep(ANSWER)
    return {"image": np.full((8, 8, 3), index % 256, np.uint8), "caption": "a photo"}


def distant(loading: Loading, *, rows: int = 64, seconds: float = 20.0) -> dict[str, float]:
  """Return images per second from such records."""
  batches = make_loader(Distant(), loading, rows=rows, side=8)
  for _ in range(2 * loading.prefetch):  # otherwise, what was read ahead before the clock starts would count
    next(batches)
  count, begin = 0, time.perf_counter()
  while time.perf_counter() < begin + seconds:
    next(batches)
    count += rows
  rate = count / (time.perf_counter() - begin)
  batches.close()
  return {"distant_images_per_second": rate}


if __name__ == "__main__":
  main(*sys.argv[1:])
