"""Test that configs/own.py chooses its sizes by a prepared data set and by the run that it starts from."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from absl import logging
from ml_collections import ConfigDict

from configs import common, own
from diffdis_jax.config import Run
from diffdis_jax.models.sizes import clip_small, sd_v1


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  lines: list[str] = []
  monkeypatch.setattr(logging, "info", lines.append)
  return lines


def prepared(folder: pathlib.Path, **splits: int) -> pathlib.Path:
  """Write the description of a data set, without its records."""
  folder.mkdir(exist_ok=True)
  info = {"splits": [{"name": name, "shardLengths": [str(n // 2), str(n - n // 2)]} for name, n in splits.items()]}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  (folder / "card.json").write_text(json.dumps({"captions": [f"caption {i % 12}" for i in range(16)]}))
  return folder


def a_run(folder: pathlib.Path, model: ConfigDict, image_size: int, *objectives: str) -> pathlib.Path:
  config = common.base(model, image_size=image_size)
  config.objectives = objectives
  folder.mkdir()
  (folder / "config.json").write_text(config.to_json())
  return folder


@pytest.fixture
def stable_diffusion(tmp_path: pathlib.Path) -> pathlib.Path:
  """Write a run as import_weights does, and return its workdir."""
  model = sd_v1()
  model.update(dtype="float32", remat="none")
  return a_run(tmp_path / "sd", model, 512, "generation", "discrimination")


@pytest.mark.parametrize(
  "pairs, batch, steps", [(8, 8, 500), (475, 32, 742), (5000, 64, 3906), (3 * 10**6, 64, 10_000)]
)
def test_batch_and_steps_follow_from_the_pairs(tmp_path, stable_diffusion, pairs, batch, steps):
  path = prepared(tmp_path / "data", train=pairs, val=3)
  config = own.get_config(f"path={path},from={stable_diffusion}")
  assert (config.batch_size, config.num_steps) == (batch, steps)
  run = Run.of(config)  # checks every field's range
  assert run.optim.warmup_steps <= run.num_steps and run.eval_every * 10 >= run.num_steps
  assert run.batch_size % run.optim.accumulate == 0


@pytest.mark.parametrize("memory, average, moment", [(24, 0, "bfloat16"), (40, 0, "bfloat16"), (80, 0.999, "float32")])
def test_a_small_card_keeps_less(tmp_path, stable_diffusion, logged, memory, average, moment):
  path = prepared(tmp_path / "data", train=5000, val=50)
  config = own.get_config(f"path={path},from={stable_diffusion},memory={memory},size=256")
  assert (config.model.remat, config.model.dtype) == ("full", "bfloat16")
  assert (config.optim.ema_decay, config.optim.first_moment) == (average, moment)
  assert config.batch_size // config.optim.accumulate == own.AT_A_TIME[memory]
  assert config.optim.contrastive_batch == "whole"
  assert len([line for line in logged if f"memory={memory} GB: {own.AT_A_TIME[memory]} images of 256 px" in line]) == 1
  full = own.get_config(f"path={path},from={stable_diffusion},memory={memory}")
  assert full.image_size == full.evals.held_out.data.image_size == 512 and full.optim.accumulate > 1
  assert full.model.unet.widths == sd_v1().unet.widths and full.init_from == str(stable_diffusion)


def test_what_is_held_out_decides_on_the_best_checkpoint(tmp_path, logged):
  path = prepared(tmp_path / "data", train=475, val=25)
  run = Run.of(own.get_config(f"path={path}"))
  assert run.train_evals == ("held_out",) and run.evals["held_out"]["data"]["split"] == "val"
  assert (run.checkpoint.best_metric, run.checkpoint.best_is) == ("held_out/loss_generation", "min")
  assert run.sample_prompts == tuple(f"caption {i}" for i in range(8))
  assert logged == ["own: 475 pairs, 25 held out: batch_size 32, 2,226 steps, 150 passes over the pairs"]
  without = Run.of(own.get_config(f"path={prepared(tmp_path / 'whole', train=475)}"))
  assert without.train_evals == () and without.checkpoint.best_metric == ""
  assert logged[-1].startswith("own: no split val")


def test_from_scratch_is_an_autoencoder_and_then_the_network_around_it(tmp_path):
  path = prepared(tmp_path / "data", train=475, val=25)
  first = own.get_config(f"path={path},autoencoder")
  assert Run.of(first).objectives == ("reconstruction",) and first.image_size == 64
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps(Run.of(first).to_dict()))
  second = own.get_config(f"path={path},from={workdir}")
  assert second.init_from == str(workdir) and second.model.to_dict() == first.model.to_dict()
  assert second.image_size == 64 and second.optim.rates.to_dict() == dict(new=5e-4, drawing=1e-3)
  changed = lambda config: {k: v for k, v in Run.of(config).to_dict().items() if k != "init_from"}
  alone = own.get_config(f"path={path}")
  assert changed(second) == changed(alone)  # equal except for where they start
  assert alone.init_from == f"config:own:path={path},autoencoder"  # train runs that config first
  assert own.get_config(f"path={path},size=32").init_from == f"config:own:path={path},autoencoder,size=32"


@pytest.mark.parametrize(
  "splits, arg, message",
  [
    ({}, "", "argument path=DIR is missing, the folder that prepare_data files wrote"),
    ({}, "path=nowhere", "nowhere; write one with diffdis prepare_data files --source=PICTURES --out=nowhere$"),
    ({}, "path=~/data", "argument path=~/data: the shell leaves the ~ of ~/data as it is behind a =; give /"),
    ({"train": 7}, "path=DATA", "has 7 pairs in split train, fewer than the smallest batch, 8"),
    ({"val": 7}, "path=DATA", "no split train in .*, only val; write one with .* --out=NEW_FOLDER$"),
    ({"train": 9}, "path=DATA,from=nowhere", "argument from=nowhere should be the workdir of a run"),
    ({"train": 9}, "path=DATA,from=SD,memory=16", "memory=16 is too little: fine-tuning .* takes 24 GB"),
    ({"train": 9}, "path=DATA,from=CLIP", "is a CLIP; it should be import_weights' folder of Stable Diffusion"),
    ({"train": 9}, "path=DATA,from=SD,autoencoder", "from=DIR has an autoencoder; leave out one"),
  ],
)
def test_bad_arguments(tmp_path, stable_diffusion, splits, arg, message):
  data = prepared(tmp_path / "data", **splits)
  clip = a_run(tmp_path / "clip", clip_small(), 32, "contrastive")
  named: dict[str, Any] = {"DATA": data, "SD": stable_diffusion, "CLIP": clip}
  for name, path in named.items():
    arg = arg.replace(f"={name}", f"={path}")
  with pytest.raises(ValueError, match=message) as error:
    own.get_config(arg)
  assert "\n" not in str(error.value)
