"""Holds the data's way from tars to batches to our bars, of which the bare cost of the same work is one.

  python -m tests.benchmark.data_bars OUT.json [PAIRS [FOLDER]]

PAIRS, by default 200,000, are prepared while memory is watched, in a temporary folder under FOLDER, of about 5 kB each.
It takes some half an hour; the time that a training step waits is of configs/diffdis_cc3m.py:runlocal.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from configs import diffdis_cc3m
from diffdis_jax.common import files
from diffdis_jax.config.data import Loading
from diffdis_jax.config.model import TextEncoderSize
from diffdis_jax.config.run import Run
from diffdis_jax.data import image_files, loader, sources
from diffdis_jax.data.prepare import latents, parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import resize
from diffdis_jax.parallel import sharding
from diffdis_jax.training.step import Trainer
from tests.benchmark import data_speed as data
from tests.benchmark import photographs

LATENT = (32, 32, 8)  # moments of a 256 px image in Stable Diffusion's autoencoder
VIEWS = 2
BATCHES = data.BATCHES | {"bare": 20, "bare_short_side": 40, "latents": 300}  # of a round
LONG = 3_000_000  # records, of the data set whose start is timed
SHARDS = 600
IMAGES, ROUNDS = 200, 15
BARS = {
  "loader_over_bare": 0.9,
  "short_side_over_source": 2.5,
  "latents_over_jpeg": 10.0,
  "data_wait": 0.02,
  "prepare_kept_per_core": 400.0,
  "prepare_reencoded_per_core": 120.0,
  "first_batch_seconds": 5.0,
  "distant_images_per_second": 1340.0,
}
ANSWER = 0.05  # seconds, in which a bucket answers


def main(out: str, num_pairs: str = "200000", scratch: str | None = None) -> None:
  """Writes every figure, the bars, and whether each is met."""
  logging.set_verbosity(logging.INFO)
  config = diffdis_cc3m.get_config("runlocal")
  run = Run.of(config)
  trainer = Trainer(run, sharding.make_mesh(**vars(run.mesh)))
  with tempfile.TemporaryDirectory(dir=scratch) as name:
    folder = pathlib.Path(name)
    results: dict[str, Any] = data.prepare_speed(
      photographs.write_photos(folder, IMAGES), folder, photographs.REPEATS * IMAGES
    )
    write_latents(folder)
    results |= loader_speeds(folder, ROUNDS)
    results |= data.data_wait(trainer, folder / "reencoded")
    results |= distant(Loading(**diffdis_cc3m.get_config().data.loader))
    results |= first_batch(folder)
    results |= memory(folder, int(num_pairs))
  higher = set(BARS) - {"data_wait", "first_batch_seconds"}
  met = {name: (results[name] >= bar) == (name in higher) for name, bar in BARS.items()}
  for name, bar in BARS.items():
    logging.info("%s %.3g, bar %g: %s", name, results[name], bar, "met" if met[name] else "missed")
  files.write_out(out, files.as_json({**results, "bars": BARS, "met": met}))


def write_latents(folder: pathlib.Path) -> None:
  """Of the smaller photographs, by an encoder that costs nothing."""

  def encode(pixels: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((len(pixels), *LATENT), np.float32)
    return noise.astype(ml_dtypes.bfloat16)

  def make_stage(stage: pathlib.Path) -> latents.LatentStage:
    return latents.LatentStage(
      stage,
      encode=encode,
      shape=LATENT,
      image_size=data.CROP,
      views=VIEWS,
      augmentation=data.AUGMENTATION,
      fingerprint="",
    )

  found = latents.find_parts(folder / "reencoded")
  prepare(found, folder / "latents", data_set=latents.data_set(folder / "reencoded"), make_stage=make_stage)


def bare_loop(source: sources.Source) -> Iterator[None]:
  """Decodes and crops the same bytes with the same library, a batch at a time, and nothing else."""
  rng = np.random.default_rng(0)
  stored = [source[i]["image"] for i in range(len(source))]
  while True:
    for start in range(0, len(stored) - data.BATCH + 1, data.BATCH):
      for content in stored[start : start + data.BATCH]:
        with image_files.open_image(content) as image:
          image.draft(None, (data.CROP, data.CROP))
          np.asarray(resize(image, data.CROP, place=rng.random()))
      yield


def loader_speeds(folder: pathlib.Path, rounds: int) -> dict[str, Any]:
  """Images a second of the loader with one thread, from each kind of records, and of the bare loop."""
  cached = sources.open_source(name="latents", path=folder / "latents", image_size=data.CROP)
  iterators = {
    **{name: data.make_loader(data.open_pairs(folder / kind)) for name, kind in data.KINDS.items()},
    "latents": data.make_loader(cached),
    "bare": bare_loop(data.open_pairs(folder / "kept")),
    "bare_short_side": bare_loop(data.open_pairs(folder / "reencoded")),
  }
  results = data.loader_speed(iterators, BATCHES, rounds)
  rates = results["images_per_second"]
  return {
    **results,
    "loader_over_bare": rates["source"] / rates["bare"],
    "short_side_over_its_bare": rates["short_side"] / rates["bare_short_side"],
    "latents_over_jpeg": rates["latents"] / rates["source"],
    "latents_over_short_side": rates["latents"] / rates["short_side"],
  }


class Distant:
  """Small records, each of which comes after ANSWER seconds. Sleeping, they need no processor."""

  def __len__(self) -> int:
    return 100_000

  def __getitem__(self, index: int) -> dict[str, Any]:
    time.sleep(ANSWER)
    return {"image": np.full((8, 8, 3), index % 256, np.uint8), "caption": "a photo"}


def distant(loading: Loading, *, rows: int = 64, seconds: float = 20.0) -> dict[str, float]:
  """Images a second from such records."""
  tokenizer = Tokenizer(TextEncoderSize().max_length)
  batches = loader.train_loader(Distant(), tokenizer=tokenizer, batch_size=rows, image_size=8, seed=0, loading=loading)
  for _ in range(2 * loading.prefetch):  # what is read ahead before the clock starts would count otherwise
    next(batches)
  count, begin = 0, time.perf_counter()
  while time.perf_counter() < begin + seconds:
    next(batches)
    count += rows
  rate = count / (time.perf_counter() - begin)
  batches.close()
  logging.info("images/s of records that take %.0f ms: %.0f", 1000 * ANSWER, rate)
  return {"distant_images_per_second": rate}


def first_batch(folder: pathlib.Path) -> dict[str, Any]:
  """Seconds to the first batch of 3 million records, at several positions: the same file is every shard."""
  long = folder / "long"
  images = [photographs.photo(np.random.default_rng(i), 64) for i in range(50)]
  (folder / "one").mkdir()
  photographs.write_tar(folder / "one" / "train-00000.tar", images, LONG // SHARDS, seed=0)
  prepare(parts.tars(folder / "one"), folder / "short")
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
    step = int(epoch * LONG / data.BATCH)
    begin = time.perf_counter()
    iterator = data.make_loader(data.open_pairs(long), threads=2)
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
  photographs.write_tar(
    raw / "train-00000.tar", [photographs.photo(np.random.default_rng(i), 96) for i in range(500)], each, seed=1
  )
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


if __name__ == "__main__":
  main(*sys.argv[1:])
