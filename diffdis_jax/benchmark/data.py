"""Times the data's way from tars to batches against the bare cost of the same work, in one run on one machine.

What is compared takes turns, round by round. Everything is synthetic and lies in a temporary folder.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from diffdis_jax.config.data import Augmentation, Loading
from diffdis_jax.config.model import TextEncoderSize
from diffdis_jax.data import image_files, loader, sources
from diffdis_jax.data.build import batch_type, open_loader
from diffdis_jax.data.prepare import builder, latents, parts
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import random_square
from diffdis_jax.parallel import sharding
from diffdis_jax.run import writers
from diffdis_jax.training.step import Trainer, is_running

SOURCE, CROP, SHORT_SIDE = 512, 256, 288  # pixels
BATCH = 16
REPEATS = 10  # of the images: fewer records than some thousands take longer to shuffle, for the way Grain does it
LATENT = (32, 32, 8)  # moments of a 256 px image in Stable Diffusion's autoencoder
VIEWS = 2
BATCHES = {"bare": 20, "bare_short_side": 40, "source": 20, "short_side": 40, "latents": 300}  # of a round
AUGMENTATION = Augmentation(crop="random", flip=True)
LONG = 3_000_000  # records, of the data set whose start is timed
SHARDS = 600
BARS = {
  "loader_over_bare": 0.9,
  "short_side_over_source": 2.5,
  "latents_over_jpeg": 10.0,
  "data_wait": 0.02,
  "prepare_kept_per_core": 400.0,
  "prepare_reencoded_per_core": 120.0,
  "first_batch_seconds": 5.0,
}


def photo(rng: np.random.Generator, side: int) -> bytes:
  """A JPEG of about a photograph's entropy: soft shapes, texture, grain."""
  noise = lambda n: Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8))
  layer = lambda n: noise(n).resize((side, side), Image.Resampling.BICUBIC)
  grain_ = rng.normal(0, 4, (side, side, 3))
  pixels = 0.75 * np.asarray(layer(12), np.float32) + 0.2 * np.asarray(layer(side // 8), np.float32) + grain_
  file = io.BytesIO()
  Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
  return file.getvalue()


def caption(rng: np.random.Generator) -> str:
  words = "a photo of the red old small house with two people near river and green trees in winter light".split()
  return " ".join(rng.choice(words, rng.integers(6, 14)))


def write_tar(path: pathlib.Path, images: list[bytes], count: int, seed: int) -> None:
  """`count` pairs of these images, each with a caption of its own."""
  rng = np.random.default_rng(seed)
  with tarfile.open(path, "w") as tar:
    for i in range(count):
      for ending, data in (("jpg", images[i % len(images)]), ("txt", caption(rng).encode()), ("json", b"{}")):
        member = tarfile.TarInfo(f"{i:06d}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def benchmark_data(
  trainer: Trainer, folder: pathlib.Path, *, images: int, num_pairs: int, rounds: int
) -> dict[str, Any]:
  """Every figure, the bars, and whether each is met.

  Args:
    trainer: of the small model whose steps wait for data.
    folder: empty; everything is written there.
    images: distinct ones of 512 px; REPEATS times as many pairs.
    num_pairs: of the preparation whose memory is watched.
    rounds: of what takes turns.
  """
  raw = folder / "raw"
  raw.mkdir()
  rng = np.random.default_rng(0)
  write_tar(raw / "train-00000.tar", [photo(rng, SOURCE) for _ in range(images)], REPEATS * images, seed=0)
  results: dict[str, Any] = prepare_speed(raw, folder, REPEATS * images)
  write_latents(folder)
  results |= loader_speed(folder, rounds)
  results |= data_wait(trainer, folder)
  results |= first_batch(folder)
  results |= memory(folder, num_pairs)
  higher = set(BARS) - {"data_wait", "first_batch_seconds"}
  met = {name: (results[name] >= bar) == (name in higher) for name, bar in BARS.items()}
  for name, bar in BARS.items():
    logging.info("%s %.3g, bar %g: %s", name, results[name], bar, "met" if met[name] else "missed")
  return {**results, "bars": BARS, "met": met}


def prepare_speed(raw: pathlib.Path, folder: pathlib.Path, images: int) -> dict[str, float]:
  """Pairs a second of processor time, one process, of 512 px JPEGs that are kept, and that are stored smaller."""
  speeds = {}
  for name, short_side in (("kept", None), ("reencoded", SHORT_SIDE)):
    begin = time.process_time()
    builder.prepare(parts.tars(raw), folder / name, settings=builder.Settings(short_side=short_side))
    speeds[f"prepare_{name}_per_core"] = images / (time.process_time() - begin)
    logging.info("prepare, %s: %.0f pairs/s a core", name, speeds[f"prepare_{name}_per_core"])
  return speeds


def write_latents(folder: pathlib.Path) -> None:
  def encode(pixels: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((len(pixels), *LATENT), np.float32)
    return noise.astype(ml_dtypes.bfloat16)

  def make_stage(stage: pathlib.Path) -> latents.LatentStage:
    return latents.LatentStage(
      stage, encode=encode, shape=LATENT, image_size=CROP, views=VIEWS, augmentation=AUGMENTATION, fingerprint=0.0
    )

  found = latents.find_parts(folder / "reencoded")
  builder.prepare(found, folder / "latents", builder=latents.LatentCache, make_stage=make_stage)


def make_loader(source: sources.Source, *, threads: int = 1, seed: int = 0) -> grain.DatasetIterator:
  return loader.train_loader(
    source,
    tokenizer=Tokenizer(TextEncoderSize().max_length),
    batch_size=BATCH,
    image_size=CROP,
    seed=seed,
    augmentation=AUGMENTATION,
    loading=Loading(num_threads=threads, prefetch=2),
  )


def bare_loop(source: sources.Source) -> Iterator[None]:
  """Decodes and crops the same bytes with the same library, a batch at a time, and nothing else."""
  rng = np.random.default_rng(0)
  stored = [source[i]["image"] for i in range(len(source))]
  while True:
    for start in range(0, len(stored) - BATCH + 1, BATCH):
      for data in stored[start : start + BATCH]:
        with image_files.open_image(data) as image:
          crop = random_square(image, rng, size=CROP)
        np.asarray(crop)
      yield


def loader_speed(folder: pathlib.Path, rounds: int) -> dict[str, Any]:
  """Images a second of the loader with one thread, from each kind of records, and of the bare loop."""
  source = lambda name: sources.open_source(
    name="latents" if name == "latents" else "pairs", path=folder / name, image_size=CROP
  )
  iterators = {
    "bare": bare_loop(source("kept")),
    "bare_short_side": bare_loop(source("reencoded")),
    "source": make_loader(source("kept")),
    "short_side": make_loader(source("reencoded")),
    "latents": make_loader(source("latents")),
  }
  images = {name: count * BATCH for name, count in BATCHES.items()}
  seconds: dict[str, list[float]] = {name: [] for name in iterators}
  processor: dict[str, list[float]] = {name: [] for name in iterators}
  for index in range(rounds + 1):
    for name, iterator in iterators.items():
      begin, cpu = time.perf_counter(), time.process_time()
      for _ in range(images[name] // BATCH):
        next(iterator)
      if index:  # the first round warms up
        seconds[name].append((time.perf_counter() - begin) / images[name])
        processor[name].append((time.process_time() - cpu) / images[name])
  rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
  cpu_rates = {name: 1 / statistics.median(values) for name, values in processor.items()}
  logging.info("images/s of processor time: %s", ", ".join(f"{name} {rate:.0f}" for name, rate in cpu_rates.items()))
  logging.info("images/s: %s", ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
  return {
    "images_per_second": rates,
    "images_per_processor_second": cpu_rates,
    "images_per_second_of_each_round": {name: [1 / value for value in values] for name, values in seconds.items()},
    "loader_over_bare": rates["source"] / rates["bare"],
    "short_side_over_its_bare": rates["short_side"] / rates["bare_short_side"],
    "short_side_over_source": rates["short_side"] / rates["source"],
    "latents_over_jpeg": rates["latents"] / rates["source"],
    "latents_over_short_side": rates["latents"] / rates["short_side"],
  }


def data_wait(trainer: Trainer, folder: pathlib.Path, *, steps: int = 30) -> dict[str, float]:
  """Share of a small model's steps spent waiting, from records of short side 288."""
  source = {"name": "pairs", "path": str(folder / "reencoded")}
  run = dataclasses.replace(trainer.run, data=dataclasses.replace(trainer.run.data, source=source, mixture={}), seed=0)
  state = trainer.with_params(trainer.init_params(jax.random.key(0)))
  iterator, substitutions = open_loader(run), loader.Substitutions()
  draw = lambda: batch_type(run.data)(**sharding.to_global(substitutions.take(next(iterator)), trainer.mesh))
  state, metrics = jax.block_until_ready(trainer.train_step(state, draw()))
  progress = writers.Throughput(start_step=0, num_steps=steps, batch_size=run.batch_size)
  for _ in range(steps):  # as train does: a batch is drawn while the step before it runs
    with progress.waiting_for_data(functools.partial(is_running, metrics)):
      batch = draw()
    state, metrics = trainer.train_step(state, batch)
  jax.block_until_ready(metrics)
  report = progress.report(steps, {})
  return {"data_wait": report["data_wait"], "small_model_steps_per_second": report["steps_per_sec"]}


def first_batch(folder: pathlib.Path) -> dict[str, Any]:
  """Seconds to the first batch of 3 million records, at several positions: the same file is every shard."""
  long = folder / "long"
  images = [photo(np.random.default_rng(i), 64) for i in range(50)]
  (folder / "one").mkdir()
  write_tar(folder / "one" / "train-00000.tar", images, LONG // SHARDS, seed=0)
  builder.prepare(parts.tars(folder / "one"), folder / "short")
  short = tfds.builder_from_directory(folder / "short")
  (file,) = short.info.splits["train"].filepaths
  long.mkdir()
  for i in range(SHARDS):
    os.link(file, long / f"pairs-train.array_record-{i:05d}-of-{SHARDS:05d}")
  split: Any = short.info.splits["train"]
  info = split.replace(shard_lengths=[LONG // SHARDS] * SHARDS)
  short.info.set_splits(tfds.core.SplitDict([info]))
  short.info.write_to_directory(long)

  seconds = {}
  for epoch in (0.0, 0.5, 0.9999, 7.3):
    step = int(epoch * LONG / BATCH)
    begin = time.perf_counter()
    iterator = make_loader(sources.open_source(name="pairs", path=long, image_size=CROP), threads=2)
    iterator.set_state({**iterator.get_state(), "next_index": step})
    next(iterator)
    seconds[f"epoch {epoch}"] = time.perf_counter() - begin
  logging.info("first batch of %d records: %s", LONG, seconds)
  return {"first_batch_seconds": max(seconds.values()), "first_batch": seconds}


def memory(folder: pathlib.Path, num_pairs: int) -> dict[str, Any]:
  """Resident memory, in MB, of a preparation by one process, against the pairs done."""
  raw, out = folder / "many", folder / "prepared"
  raw.mkdir()
  each = 5000
  write_tar(raw / "train-00000.tar", [photo(np.random.default_rng(i), 96) for i in range(500)], each, seed=1)
  for i in range(1, max(1, num_pairs // each)):
    os.link(raw / "train-00000.tar", raw / f"train-{i:05d}.tar")
  command = [sys.executable, "-m", "diffdis_jax.prepare_data", "pairs", f"--source={raw}", f"--out={out}"]
  process = subprocess.Popen([*command, "--num_processes=1"], stderr=subprocess.PIPE, text=True)
  curve, begin = [], time.perf_counter()
  done = lambda: sum(1 for _ in (folder / ".prepared.partial" / "parts").glob("*.json")) * each
  assert process.stderr is not None  # a pipe
  drain = threading.Thread(target=process.stderr.read, daemon=True)
  drain.start()
  while process.poll() is None:
    resident = _resident(process.pid)
    if resident and (not curve or done() > curve[-1][0]):
      curve.append((done(), resident))
    time.sleep(0.05)
  seconds = time.perf_counter() - begin
  if process.returncode:
    raise RuntimeError(f"preparation ended with {process.returncode}")
  thin = curve[:: max(1, len(curve) // 10)]
  logging.info("memory of the preparation: %s", ", ".join(f"{n:,} pairs {mb:.0f} MB" for n, mb in thin))
  return {"memory_curve": thin, "memory_pairs": num_pairs, "memory_pairs_per_second": num_pairs / seconds}


def _resident(pid: int) -> float | None:
  try:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  except OSError:
    return None
  return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), None)
