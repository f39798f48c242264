"""Test that both stages are trained on the long-tailed shapes, resume after a kill, are evaluated and exported."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import places_lt
from diffdis_jax import export_weights
from diffdis_jax.errors import UserError
from diffdis_jax.interop import from_torch
from diffdis_jax.run import checkpoint, restore, workdir
from diffdis_jax.structs import TrainState
from diffdis_jax.training import start
from tests import command_runs, steps, tiny_clip
from tests.command_runs import ROOT, call
from tests.models.networks import random_params
from tests.steps import build_trainer, config_of
from tests.test_resume import assert_same_end, kill_when, metrics, restore_training, steps_logged

pytest_plugins = ("tests.command_runs", "tests.untrained")

STEPS = 12


def config_flag(stage: int, init: str) -> str:
  return f"--config=tests/tiny_lt.py:stage={stage},init={init}"


def train(environment: dict[str, str], stage: int, init: str, path: Any) -> None:
  done = call("train", environment, config_flag(stage, init), f"--workdir={path}")
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def first(run_once: Callable[..., pathlib.Path], run: str) -> str:
  """Return the workdir of a finished run of stage 1 of DiffDis."""
  return str(run_once("long_tail1", "train", config_flag(1, run)))


@pytest.fixture(scope="session")
def second(run_once: Callable[..., pathlib.Path], first: str) -> str:
  """Return the workdir of the run of stage 2 that follows."""
  return str(run_once("long_tail2", "train", config_flag(2, first)))


@pytest.fixture(scope="module", autouse=True)
def tokens_are_kept(environment: dict[str, str]) -> Iterator[None]:
  """Share the cache of tokens with the commands."""
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
  backbone, params = saved(first), saved(second)
  for name, value in backbone.items():
    np.testing.assert_array_equal(params[name], value, err_msg=name)
  head = params.keys() - backbone.keys()
  assert head and all(name.startswith("head.") for name in head)
  chosen = json.loads((pathlib.Path(second) / "anchors.json").read_text())
  assert len(chosen) == 64 and {len(own["sentences"]) for own in chosen} == {3}
  losses = np.array([[sentence["loss"] for sentence in own["sentences"]] for own in chosen])
  assert (np.diff(losses, axis=1) >= 0).all()
  np.testing.assert_allclose(np.linalg.norm(params["head.anchors"], axis=-1), 1.0, rtol=1e-5)  # text queries


@pytest.mark.full
def test_a_second_stage_is_evaluated_for_the_columns_of_table_8(second, environment, tmp_path):
  words = ("evaluate", f"--workdir={second}", "--tasks=long_tail", f"--out={tmp_path / 'F.json'}")
  done = command_runs.run([sys.executable, "-m", "replication", *words], environment)
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / "F.json").read_text())["long_tail"]["test"]
  assert {"image_acc", "text_acc", "knn_acc", "acc", "acc_low", "acc_summed_low"} <= record["metrics"].keys()
  assert all(0 <= value <= 1 for value in record["metrics"].values())
  assert record["protocol"]["num_sentences"] == 8960 and record["protocol"]["checkpoint"] == STEPS
  assert "the paper's DiffDis" in (tmp_path / "F.md").read_text()


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_killed_at_its_start_and_at_a_random_step_ends_in_the_same_bits(
  stage, run, first, second, environment, tmp_path
):
  init, whole = ((run, first), (first, second))[stage - 1]
  killed, chosen = tmp_path / "killed", random.randint(4, 7)
  command = [sys.executable, "-m", "diffdis_jax.train", config_flag(stage, init), f"--workdir={killed}"]
  # Kill the run before its first step, while the network is compiled or anchors are chosen.
  kill_when(command, environment, (killed / "config.json").exists)
  kill_when(command, environment, lambda: chosen in steps_logged(killed))
  assert (workdir.latest_step(str(killed)) or 0) < STEPS
  assert subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL).returncode == 0
  assert_same_end(killed, pathlib.Path(whole))


def untrained(path: pathlib.Path, config: ConfigDict, step: int) -> str:
  """Write a run of this config with random parameters."""
  workdir.open_for_training(str(path), config.to_dict())
  params = random_params(build_trainer(config, steps.make_mesh()).shapes, seed=0)
  with checkpoint.Checkpointer(str(path)) as checkpointer:
    checkpointer.save(step, TrainState(params=params))
  return str(path)


def config_of_stage(stage: int, config: ConfigDict) -> ConfigDict:
  config.optim.epoch_steps = 2
  if stage == 1:
    places_lt.first_stage(config, rate=1e-3, text=True)
  else:
    places_lt.second_stage(config, classes=64, anchors=3, visual=1e-3, language=1e-3)
  return config


def test_the_head_of_a_clip_is_exported_to_its_own_file(tmp_path):
  run = untrained(tmp_path / "run", config_of_stage(2, tiny_clip.get_config()), 8)
  export_weights.export_weights(run, str(tmp_path / "out"))
  head, params = load_file(tmp_path / "out" / "head.safetensors"), saved(run)
  np.testing.assert_array_equal(head["fc1.weight"], params["head.fc1.kernel"].T)
  np.testing.assert_array_equal(head["anchors"], params["head.anchors"])
  assert len(head) == sum(name.startswith("head.") for name in params)
  assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "head" in name]
  assert "CLIPModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
  assert sorted(from_torch.open_source(tmp_path / "out").others) == sorted(f"head/{name}" for name in head)


@pytest.mark.parametrize(
  "stage, kind, message",
  [
    (1, None, "init_from is empty; objective class_contrastive starts from a trained DiffDis or CLIP"),
    (2, None, "init_from is empty; objective long_tail_head starts from stage 1's workdir"),
    (1, steps.make_config("generation"), "lacks an image or a text side: it has no alignment.*or contrastive"),
    (2, steps.make_config(), "was trained for generation, discrimination, and long_tail_head starts from class_contr"),
    (2, config_of_stage(1, steps.make_config()), "is class_contrastive at step 4 of 8; train it to its end first"),
  ],
)
def test_wrong_starts_are_refused(stage, kind, message, tmp_path):
  path = "" if kind is None else untrained(tmp_path / "start", kind, 4)
  with pytest.raises(UserError, match=message) as error:
    start.find_initial(path, build_trainer(config_of_stage(stage, steps.make_config()), steps.make_mesh()))
  assert "\n" not in str(error.value)
