"""Times CLIP's training step, ViT-B/32 in f32, against open_clip's under PyTorch, in turns in one process.

  python -m tests.benchmark.clip_step [ROUNDS]

Both get a batch of 16 that lies in memory, and are done when the parameters are. Each uses all cores that it may.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import torch
from ml_collections import ConfigDict
from open_clip.model import CLIP

from configs import clip_cc3m
from tests import steps
from tests.models import open_clip_twin
from tests.training.test_contrastive import MAX_LOGIT_SCALE, their_loss, their_optimizer

BATCH = 16


def main(rounds: int = 7) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  config = clip_cc3m.get_config("model=vit_b32,recipe=openclip")
  config.batch_size, config.model.dtype = BATCH, "float32"
  ways = {"ours": ours(steps.Trainer(config)), "open_clip": theirs(open_clip_twin.make(config.model), config)}
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for index in range(rounds + 1):
    for name, step in ways.items():
      begin = time.perf_counter()
      step()
      if index:  # the first round warms up
        seconds[name].append(round(time.perf_counter() - begin, 2))
  median = {name: statistics.median(values) for name, values in seconds.items()}
  ratio = round(median["ours"] / median["open_clip"], 2)
  json.dump({"seconds": seconds, "median": median, "ours_over_open_clip": ratio}, sys.stdout, indent=2)


def ours(trainer: steps.Trainer) -> Callable[[], None]:
  state, batch = trainer.initial(), steps.make_batch(trainer.config)

  def step() -> None:
    nonlocal state
    state, _ = trainer.run(state, batch)
    jax.block_until_ready(state)

  return step


def theirs(model: CLIP, config: ConfigDict) -> Callable[[], None]:
  optimizer, batch = their_optimizer(model.train(), config), steps.make_batch(config)

  def step() -> None:
    optimizer.zero_grad()
    their_loss(model, batch).backward()
    optimizer.step()
    with torch.no_grad():
      model.logit_scale.clamp_(0, float(MAX_LOGIT_SCALE))

  return step


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
