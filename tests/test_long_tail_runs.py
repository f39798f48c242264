"""Run both stages by commands on the long-tailed shapes: train, resume after a kill, evaluate and export them."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import places_lt
from diffdis_jax import export_weights
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks as sections
from diffdis_jax.interop import from_torch
from diffdis_jax.run import checkpoint, restore, workdir
from diffdis_jax.structs import TrainState
from diffdis_jax.training import start
from diffdis_jax.training.step import Trainer
from tests import steps, tiny_clip
from tests.command_runs import ROOT, call
from tests.models.networks import random_params
from tests.once import made_once
from tests.steps import build_trainer, config_of
from tests.test_resume import kill_when, metrics, restore_training, steps_logged

pytest_plugins = ("tests.command_runs", "tests.untrained")

STEPS = 12


def flags(stage: int, init: str, path: Any) -> list[str]:
  return [f"--config=tests/tiny_lt.py:stage={stage},init={init}", f"--workdir={path}"]


def train(environment: dict[str, str], stage: int, init: str, path: Any) -> None:
  done = call("train", environment, *flags(stage, init, path))
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], run: str) -> str:
  """Workdir of a finished stage 1 of DiffDis."""
  return str(made_once(tmp_path_factory, "long_tail1", lambda path: train(environment, 1, run, path)))


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], first: str) -> str:
  """Workdir of the stage 2 that follows."""
  return str(made_once(tmp_path_factory, "long_tail2", lambda path: train(environment, 2, first, path)))


@pytest.fixture(scope="module", autouse=True)
def tokens_are_kept(environment: dict[str, str]) -> Iterator[None]:
  """Keep the tokens where the commands keep them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    yield


def saved(path: str) -> dict[str, np.ndarray]:
  return {name: np.asarray(value) for name, value in restore.restore_params(path).items()}


@pytest.mark.full
def test_the_first_stage_starts_from_the_run_and_distils_from_it(run, first):
  before, after = saved(run), saved(first)
  assert after.keys() < before.keys() and not [name for name in after if name.startswith("unet.up")]
  changed = {name for name in after if (before[name] != after[name]).any()}
  assert "logit_scale" in changed and not [name for name in changed if name.startswith("autoencoder")]
  trainer = build_trainer(config_of(first), steps.make_mesh())
  state, _ = restore_training(pathlib.Path(first))
  assert state.teacher.keys() == set(trainer.trainable)
  for name, value in state.teacher.items():
    np.testing.assert_array_equal(value, before[name], err_msg=name)
  lines = [line for line in metrics(pathlib.Path(first)) if "loss" in line]
  assert {"loss_class_contrastive", "loss_distill", "class_accuracy", "temperature"} <= lines[-1].keys()
  assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]


@pytest.mark.full
def test_the_second_stage_keeps_the_backbone_and_its_anchors(first, second):
  backbone, both = saved(first), saved(second)
  for name, value in backbone.items():
    np.testing.assert_array_equal(both[name], value, err_msg=name)
  head = both.keys() - backbone.keys()
  assert head and all(name.startswith("head.") for name in head)
  chosen = json.loads((pathlib.Path(second) / "anchors.json").read_text())
  assert len(chosen) == 64 and {len(own["sentences"]) for own in chosen} == {3}
  losses = np.array([[each["loss"] for each in own["sentences"]] for own in chosen])
  assert (np.diff(losses, axis=1) >= 0).all()
  anchors = both["head.anchors"]
  np.testing.assert_allclose(np.linalg.norm(anchors, axis=-1), 1.0, rtol=1e-5)  # text queries


@pytest.mark.full
def test_a_second_stage_is_measured_in_table_8s_columns(second, environment, tmp_path):
  done = call("evaluate", environment, f"--workdir={second}", "--tasks=long_tail", f"--out={tmp_path / 'F.json'}")
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / "F.json").read_text())["long_tail"]["test"]
  assert {"image_acc", "text_acc", "knn_acc", "acc", "acc_low", "acc_summed_low"} <= record["metrics"].keys()
  assert all(0 <= value <= 1 for value in record["metrics"].values())
  assert record["protocol"]["num_sentences"] == 8960 and record["protocol"]["checkpoint"] == STEPS
  assert "the paper's DiffDis" in (tmp_path / "F.md").read_text()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
  """Workdir of CLIP that was never trained, of 16 px images."""
  return untrained(tmp_path_factory.mktemp("long_tail") / "clip", tiny_clip.get_config(), 8)


@pytest.mark.full
def test_killed_once_it_ends_in_the_same_bits(clip, environment, tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  train(environment, 1, clip, whole)
  command = [sys.executable, "-m", "diffdis_jax.train", *flags(1, clip, killed)]
  chosen = random.randint(4, 7)
  kill_when(command, environment, lambda: chosen in steps_logged(killed))
  assert (workdir.latest_step(str(killed)) or 0) < STEPS
  assert subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL).returncode == 0
  assert_same_end(killed, whole)
  lines = [line for line in metrics(whole) if "loss" in line]
  assert {"loss_class_contrastive", "loss_distill", "class_accuracy", "temperature"} <= lines[-1].keys()
  assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_killed_five_times_at_random_it_ends_in_the_same_bits(stage, run, first, second, environment, tmp_path):
  """The moment may be while anchors are chosen, steps are taken, or a checkpoint is written."""
  init, whole = ((run, first), (first, second))[stage - 1]
  whole = pathlib.Path(whole)
  killed, chance = tmp_path / "killed", random.Random(stage)
  command = [sys.executable, "-m", "diffdis_jax.train", *flags(stage, init, killed)]
  # Before the first step: the network is being compiled, or anchors are being chosen.
  kill_when(command, environment, (killed / "config.json").exists)
  for _ in range(4):
    logged = set(steps_logged(killed))
    later = chance.randint(0, 3)
    kill_when(command, environment, lambda logged=logged, later=later: len({*steps_logged(killed)} - logged) > later)
    if (workdir.latest_step(str(killed)) or 0) == STEPS:
      break
  assert subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL).returncode == 0
  assert_same_end(killed, whole)


def assert_same_end(killed: pathlib.Path, whole: pathlib.Path) -> None:
  assert metrics(killed) == metrics(whole)
  (expected, next_batch), (found, next_found) = restore_training(whole), restore_training(killed)
  np.testing.assert_array_equal(next_found, next_batch)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def untrained(path: pathlib.Path, config: ConfigDict, step: int) -> str:
  """A run of this config that was never trained."""
  workdir.open_for_training(str(path), config.to_dict())
  params = random_params(build_trainer(config, steps.make_mesh()).shapes, seed=0)
  with checkpoint.Checkpointer(str(path)) as checkpointer:
    checkpointer.save(step, TrainState(params=params))
  return str(path)


def clip_with_head(config: ConfigDict) -> ConfigDict:
  config.optim.epoch_steps = 2
  places_lt.second_stage(config, classes=64, anchors=3, visual=1e-3, language=1e-3)
  return config


@pytest.mark.full
def test_a_clip_goes_through_both_stages(clip, environment, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  train(environment, 1, clip, one)
  train(environment, 2, str(one), two)
  assert saved(str(two))["head.anchors"].shape == (64, 3, 12)


def test_a_clips_head_leaves_beside_it(tmp_path):
  run = untrained(tmp_path / "run", clip_with_head(tiny_clip.get_config()), 8)
  export_weights.export_weights(run, str(tmp_path / "out"))
  head, params = load_file(tmp_path / "out" / "head.safetensors"), saved(run)
  np.testing.assert_array_equal(head["fc1.weight"], params["head.fc1.kernel"].T)
  np.testing.assert_array_equal(head["anchors"], params["head.anchors"])
  assert len(head) == sum(name.startswith("head.") for name in params)
  assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "head" in name]
  assert "CLIPModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
  assert sorted(from_torch.open_source(tmp_path / "out").others) == sorted(f"head/{name}" for name in head)


@pytest.mark.full
def test_a_wrong_start_ends_the_command_in_one_line(run, environment, tmp_path):
  done = call("train", environment, *flags(2, run, tmp_path / "out"))
  assert done.returncode == 2 and not (tmp_path / "out").exists()
  assert done.stderr.count("error: ") == 1 and "long_tail_head starts from class_contrastive" in done.stderr


def trainer_of(stage: int) -> Trainer:
  """Return the trainer of a stage of a tiny DiffDis."""
  config = steps.make_config()
  config.optim.epoch_steps = 2
  if stage == 1:
    places_lt.first_stage(config, rate=1e-3, text=True)
  else:
    places_lt.second_stage(config, classes=64, anchors=3, visual=1e-3, language=1e-3)
  return build_trainer(config, steps.make_mesh())


def first_stage(config: ConfigDict) -> ConfigDict:
  config.optim.epoch_steps = 2
  places_lt.first_stage(config, rate=1e-3, text=True)
  return config


@pytest.mark.parametrize(
  "stage, kind, message",
  [
    (1, None, "init_from is empty; objective class_contrastive starts from a trained DiffDis or CLIP"),
    (2, None, "init_from is empty; objective long_tail_head starts from stage 1's workdir"),
    (1, steps.make_config("generation"), "lacks an image or a text side: it has no alignment.*or contrastive"),
    (
      2,
      steps.make_config(),
      "was trained for generation, discrimination, and long_tail_head starts from class_contrastive",
    ),
    (2, first_stage(steps.make_config()), "is class_contrastive at step 4 of 8; train it to its end first"),
  ],
)
def test_starts_that_are_none(stage, kind, message, tmp_path):
  path = "" if kind is None else untrained(tmp_path / "start", kind, 4)
  with pytest.raises(UserError, match=message) as error:
    start.find_initial(path, trainer_of(stage))
  assert "\n" not in str(error.value)


def test_long_tail_takes_no_prepared_folder(tmp_path):
  with pytest.raises(UserError, match="leave out --data"):
    sections.of_folder("folder", "test", tasks=["long_tail"], image_size=16)
