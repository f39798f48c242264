"""Times the data's way from tars to batches: preparation, the loader, and how long a small model's steps wait for it.

What is compared takes turns, round by round. Everything is synthetic and lies in a temporary folder.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
from absl import logging

from diffdis_jax.config.data import Augmentation, Loading
from diffdis_jax.config.model import TextEncoderSize
from diffdis_jax.data import loader, sources
from diffdis_jax.data.build import batch_type, open_loader
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import Stage, prepare
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.parallel import sharding
from diffdis_jax.training.metrics import Meters
from diffdis_jax.training.step import Trainer

SHORT_SIDE, CROP = 288, 256  # pixels of an image as it is stored, and of what is seen of it
BATCH = 16
BATCHES = {"source": 20, "short_side": 40}  # of a round: about as long for each
KINDS = {"source": "kept", "short_side": "reencoded"}  # what the loader reads -> its folder
AHEAD = 2  # batches that the loader reads ahead, which cost nothing once they are there
AUGMENTATION = Augmentation(crop="random", flip=True)


def prepare_speed(raw: pathlib.Path, folder: pathlib.Path, images: int) -> dict[str, float]:
  """Pairs a second of processor time, one process, of 512 px JPEGs that are kept, and that are stored smaller."""
  speeds = {}
  for name, short_side in (("kept", None), ("reencoded", SHORT_SIDE)):
    # The processor's time: by the clock it would be the speed of what else this machine does.
    begin = time.process_time()
    prepare(parts.tars(raw), folder / name, make_stage=functools.partial(Stage, short_side=short_side))
    speeds[f"prepare_{name}_per_core"] = images / (time.process_time() - begin)
    logging.info("prepare, %s: %.0f pairs/s a core", name, speeds[f"prepare_{name}_per_core"])
  return speeds


def open_pairs(folder: pathlib.Path) -> sources.Source:
  """What was prepared there."""
  return sources.open_source(name="pairs", path=folder, image_size=CROP)


def make_loader(source: sources.Source, *, threads: int = 1, seed: int = 0) -> grain.DatasetIterator:
  return loader.train_loader(
    source,
    tokenizer=Tokenizer(TextEncoderSize().max_length),
    batch_size=BATCH,
    image_size=CROP,
    seed=seed,
    augmentation=AUGMENTATION,
    loading=Loading(num_threads=threads, prefetch=AHEAD),
  )


def loader_speed(iterators: Mapping[str, Iterator[Any]], batches: Mapping[str, int], rounds: int) -> dict[str, Any]:
  """Images a second of each iterator over batches of BATCH images.

  Args:
    iterators: by name; among them `source` and `short_side`, the loader's from photographs and from smaller ones.
    batches: of a round.
    rounds: beside one that warms up.
  """
  images = {name: batches[name] * BATCH for name in iterators}
  seconds: dict[str, list[float]] = {name: [] for name in iterators}
  processor: dict[str, list[float]] = {name: [] for name in iterators}
  for index in range(rounds + 1):
    for name, iterator in iterators.items():
      for _ in range(AHEAD):  # what was read before the clock starts would count otherwise
        next(iterator)
      begin, cpu = time.perf_counter(), time.process_time()
      for _ in range(images[name] // BATCH):
        next(iterator)
      took, of_processor = time.perf_counter() - begin, time.process_time() - cpu
      if index:  # the first round warms up
        seconds[name].append(took / images[name])
        processor[name].append(of_processor / images[name])
      time.sleep(AHEAD * took / batches[name])  # it reads ahead again now, and not while the next one is timed
  # The median: a round that something else disturbed does not count.
  rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
  cpu_rates = {name: 1 / statistics.median(values) for name, values in processor.items()}
  logging.info("images/s of processor time: %s", ", ".join(f"{name} {rate:.0f}" for name, rate in cpu_rates.items()))
  logging.info("images/s: %s", ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
  return {
    "images_per_second": rates,
    "images_per_processor_second": cpu_rates,
    "images_per_second_of_each_round": {name: [1 / value for value in values] for name, values in seconds.items()},
    "short_side_over_source": rates["short_side"] / rates["source"],
  }


def data_wait(trainer: Trainer, prepared: pathlib.Path, *, steps: int = 30) -> dict[str, float]:
  """Share of a small model's steps spent waiting for the records that were prepared there."""
  source = {"name": "pairs", "path": str(prepared)}
  run = dataclasses.replace(trainer.run, data=dataclasses.replace(trainer.run.data, source=source, mixture={}), seed=0)
  state = trainer.with_params(trainer.init_params(jax.random.key(0)))
  iterator, substitutions = open_loader(run), loader.Substitutions()
  draw = lambda: batch_type(run.data)(**sharding.to_global(substitutions.take(next(iterator)), trainer.mesh))
  # The first step compiles, and is not timed. Nor is what was read ahead meanwhile, which a long run has no more of
  # where its steps wait, and the steps in which it is read again where they do not.
  state, metrics = trainer.train_step(state, draw())
  for _ in range(run.data.loader.prefetch):
    draw()
  for _ in range(run.data.loader.prefetch):
    state, metrics = trainer.train_step(state, draw())
  jax.block_until_ready(metrics)
  meters = Meters(run, start_step=0, meta={})
  for step in range(1, steps + 2):  # as train does: a batch is loaded while the step before it runs
    rows = sharding.to_global(meters.next_rows(iterator), trainer.mesh)
    state, metrics = trainer.train_step(state, batch_type(run.data)(**rows))
    meters.add(step, metrics)  # the first step begins the clock
  report = meters.report(steps + 1)
  return {"data_wait": report["data_wait"], "small_model_steps_per_second": report["steps_per_sec"]}
