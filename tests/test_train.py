from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from diffdis_jax import evaluate
from diffdis_jax.common import machine
from diffdis_jax.config import Run, read_fields
from diffdis_jax.errors import Diverged, UserError
from diffdis_jax.evals import tasks as evals
from diffdis_jax.parallel import sharding
from diffdis_jax.run import provenance, restore, workdir
from diffdis_jax.training import loop
from tests import steps, tiny
from tests.command_runs import STEPS, call
from tests.steps import config_of

pytest_plugins = ("tests.command_runs",)


def lines_of(run: str) -> list[dict[str, float]]:
  return [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]


def pixels(path: pathlib.Path) -> np.ndarray:
  with Image.open(path) as image:
    return np.asarray(image)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(config: ConfigDict, path: pathlib.Path, message: str) -> None:
  """Check that the run is refused in one line, and changes no file and makes none."""
  before = files_of(path) if path.exists() else None
  with pytest.raises(UserError, match=message) as error:
    loop.train_and_evaluate(Run.of(config), str(path))
  assert "\n" not in str(error.value)
  assert (files_of(path) if path.exists() else None) == before


def test_a_run_writes_metrics_config_history_checkpoints_and_samples(joint_run):
  run = pathlib.Path(joint_run)
  lines = lines_of(joint_run)
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  quarters = {f"loss_{name}_q{i}" for name in ("generation", "discrimination") for i in (1, 2, 3, 4)}
  losses = {"loss", "loss_generation", "loss_discrimination"}
  others = {"grad_norm", "alignment_accuracy", "temperature", "substituted"}
  speeds = {"steps_per_sec", "images_per_sec", "data_wait"}
  for line in lines:
    assert line.keys() == {"step"} | losses | quarters | others | speeds
    assert all(math.isfinite(line[name]) for name in losses | others)
    if line["step"] == 1:  # the step was compiled in it, so that it has no speed
      assert {line[name] for name in speeds} == {None}
    else:
      assert 0 <= line["data_wait"] <= 1 and line["steps_per_sec"] > 0
    # The logged L_ITA averages rows with an image, the loss all rows: training/test_step.py has the exact relation.
    assert line["loss"] > line["loss_generation"]
  assert np.mean([line["loss"] for line in lines[-4:]]) < np.mean([line["loss"] for line in lines[:4]])
  assert json.loads((run / "config.json").read_text())["num_steps"] == STEPS
  assert list(run.glob("events.out.tfevents.*"))
  start, end = provenance.read(run)
  assert (start["event"], start["step"], start["devices"], end["why"]) == ("start", 0, 1, "finished")
  assert start["processors"] == machine.processors()
  assert start["parameters"]["frozen"]["autoencoder"] > 0 and start["data"]
  assert workdir.latest_step(joint_run) == STEPS
  assert pixels(run / "samples" / f"samples_{STEPS:08d}.png").std() > 0
  assert not list(run.rglob("*tmp*"))


def test_a_joint_run_takes_its_autoencoder_from_the_start_and_keeps_it(joint_run, autoencoder_run):
  expected = restore.restore_params(autoencoder_run)
  raw = restore.restore_params(autoencoder_run, ema=False)
  joint = restore.restore_params(joint_run, ema=False)
  for name, value in expected.items():
    np.testing.assert_array_equal(joint[name], value, err_msg=name)
  kernel = "autoencoder.conv_in.kernel"
  assert (np.asarray(expected[kernel]) != np.asarray(raw[kernel])).any(), "the averaged ones are taken"
  assert (np.asarray(joint["autoencoder.scale"]) != 1).all()
  assert {line["loss_l1"] > 0 for line in lines_of(autoencoder_run)} == {True}


def test_the_run_is_evaluated_and_generates_through_the_command_line(joint_run, joint_results, joint_images):
  results = json.loads(joint_results.read_text())["zero_shot"]
  assert results.keys() == {"test", "unseen"}
  known = provenance.code()
  trained = {"commits": [known["commit"]], "clean": known["clean"]}
  start = provenance.of_config(tiny.get_config("autoencoder").to_dict()) | trained | {"steps": 8}
  assert start.pop("init_from") == []
  for record in results.values():
    assert 0 <= record["metrics"]["acc1"] <= record["metrics"]["acc5"] <= 1
    assert record["protocol"]["checkpoint"] == STEPS and record["protocol"]["ema"] is True
    origin = record["provenance"]
    assert {name: origin[name] for name in known} == known and len(known["commit"]) == 40
    assert origin["device"] == {"kind": "cpu", "count": 1} and "/" not in json.dumps(origin)
    run = provenance.of_config(read_fields(joint_run)) | trained | {"steps": STEPS, "seed": 0, "init_from": [start]}
    assert origin["run"] == run and run["config_hash"] != start["config_hash"]
    assert provenance.read(joint_run)[0]["init_from"] == [start]

  assert {path.name for path in joint_images.iterdir()} == {"00000.png", "00001.png", "grid.png", "prompts.json"}
  first, second = (pixels(joint_images / f"0000{i}.png") for i in range(2))
  assert first.shape == second.shape == (16, 16, 3) and (first != second).any()


@pytest.mark.slow
def test_a_run_evaluates_averaged_parameters_as_evaluate_does(environment, tmp_path, monkeypatch):
  run, last = str(tmp_path / "run"), 3
  data = {"name": "shapes", "split": "test", "num_images": 64}
  added = [{"name": name, "task": task, "data": data} for name, task in (("a", "zero_shot"), ("b", "retrieval"))]
  added[0]["label_field"] = "colour"
  fields = {"objectives": ("discrimination",), "num_steps": last, "eval_every": 1, "train_evals": ("test",)}
  # The rates are so high that parameters and their averages give different figures.
  fields |= {"optim.warmup_steps": 0, "optim.rates.text": 0.05, "optim.rates.unet": 0.02, "optim.rates.new": 0.02}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  flags += [f"--eval={json.dumps(section)}" for section in added]
  done = call("train", environment, "--config=tests/tiny.py", f"--workdir={run}", *flags)
  assert done.returncode == 0, done.stderr
  config = json.loads((pathlib.Path(run) / "config.json").read_text())
  assert config["evals"]["a"]["data"]["image_size"] == 16
  recorded: dict[int, dict[str, float]] = {}
  for line in lines_of(run):
    values = {name: value for name, value in line.items() if "/" in name}
    recorded[line["step"]] = recorded.get(line["step"], {}) | values
  assert sorted(recorded) == [1, 2, 3]
  for values in recorded.values():
    assert {name.split("/")[0] for name in values} == {"test", "a", "b"}
    assert {"test/acc1", "a/mean_per_class_recall", "a/acc5", "b/image_retrieval_recall@1"} <= values.keys()

  # Evaluate on one device, as the run did: rounding may decide between two images.
  mesh = steps.make_mesh()
  monkeypatch.setattr(sharding, "make_mesh", lambda **axes: mesh)
  sections = evals.of_config({name: config["evals"][name] for name in ("test", "a", "b")}, tasks=None)
  averaged, raw = (evaluate.evaluate(run, sections, step=last, ema=ema) for ema in (True, False))
  named = lambda results: {
    f"{name}/{metric}": value
    for sets in results.values()
    for name, record in sets.items()
    for metric, value in record["metrics"].items()
  }
  assert named(averaged) == pytest.approx(recorded[last])
  differences = [value - recorded[last][name] for name, value in named(raw).items()]
  assert np.abs(differences).max() > 1.5 / 64, "the figures do not show which parameters were measured"


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 12}, "batch_size is 12; .* multiple of 8, such as"),
    ({"mesh.fsdp": 3}, "mesh data=-1, fsdp=3, tensor=1 takes 3 devices .* but there are 8"),
    ({"model.dtype": "float8"}, "model.dtype is 'float8'; it must be one of float32, bfloat16"),
    ({"data.name": "shape"}, "unknown data source 'shape'; there are shapes, pairs"),
    ({"data.augment.crop": "all"}, "data.augment.crop is 'all'; it must be one of centre, random, random_resized"),
    ({"data.mixture": {"a": {"pth": "x"}}}, "data.mixture.a: .*'pth'"),
    ({"data.split": "training"}, "shapes has no split 'training'"),
    ({"data.caption_field": ("caption",)}, "a data source has no field 'caption_field'; did you mean caption_fields?"),
    ({"data.name": "pairs", "data.path": "nowhere"}, "no prepared data set in 'nowhere'"),
    ({"train_evals": ("tset",)}, "train_evals names tset; evals has generated, held_out, test, test_retrieval, unseen"),
    ({"train_evals": ("test",), "objectives": ("generation",)}, "train_evals has test, whose task zero_shot measures"),
    ({"text_diffusion.schedule": "cosin"}, "text_diffusion.schedule is 'cosin'; it must be one of scaled_linear"),
    ({"checkpoint.keep_best": 1}, "keep_best is 1 and best_metric ''; keep_best needs the name of a metric"),
    ({"checkpoint.keep_best": 1, "checkpoint.best_metric": "a/b"}, "best_metric=a/b should be NAME/METRIC, of one"),
    ({"text_diffusion.target": "date"}, "text_diffusion.target is 'date'; it must be one of data, noise"),
  ],
)
def test_bad_configs_are_refused_before_the_workdir_is_made(tmp_path, changes, message):
  config = tiny.get_config()
  config.update_from_flattened_dict(changes)
  refused(config, tmp_path / "run", message)


def test_a_workdir_of_another_config_names_every_field_and_both_values(joint_run):
  config = config_of(joint_run)
  config.batch_size, config.optim.rates.new = 32, 0.5
  message = r"batch_size is 16 there and 32 here, optim\.rates\.new is 0\.0015 there and 0\.5 here"
  refused(config, pathlib.Path(joint_run), message)


@pytest.mark.slow
def test_a_run_that_is_made_longer_ends_in_the_same_bits(tmp_path, caplog):
  """The learning rates are constant, so that they do not depend on the length of the run."""
  caplog.set_level(logging.INFO)
  config = tiny.get_config("autoencoder")
  config.update(num_steps=6, save_every=6, log_every=1)
  config.optim.update(schedule_kind="constant", warmup_steps=2)
  whole, longer = str(tmp_path / "whole"), str(tmp_path / "longer")
  loop.train_and_evaluate(Run.of(config), whole)
  for num_steps in (4, 6):
    config.num_steps = num_steps
    loop.train_and_evaluate(Run.of(config), longer)
  assert "the run gets longer: 6 steps instead of 4, by its constant schedule" in caplog.messages
  expected, params = (restore.restore_params(run, ema=False) for run in (whole, longer))
  assert expected.keys() == params.keys()
  assert [name for name in expected if expected[name].tobytes() != params[name].tobytes()] == []
  assert [line["step"] for line in lines_of(longer)] == [1, 2, 3, 4, 5, 6]
  starts = [event for event in provenance.read(longer) if event["event"] == "start"]
  assert [(start["step"], start["num_steps"]) for start in starts] == [(0, 4), (4, 6)]

  config.num_steps = 4
  refused(config, pathlib.Path(longer), "num_steps is 6 there and 4 here")


@pytest.mark.parametrize(
  "widths, message",
  [
    ((8,), "no checkpoint in"),
    ((16,), r"autoencoder\.\S+ has shape .*8.* there and .*16.* in this config; use the same model section"),
  ],
)
def test_init_from_without_a_checkpoint_or_of_another_shape_is_refused(tmp_path, autoencoder_run, widths, message):
  config = tiny.get_config("autoencoder")
  config.init_from = autoencoder_run if widths == (16,) else str(tmp_path)
  config.model.autoencoder.widths = widths
  refused(config, tmp_path / "run", message)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
  config = tiny.get_config("autoencoder")
  config.optim.update(clip_norm=0.0, warmup_steps=0, rates=dict(new=1e30), skip_bad_steps=0)
  config.update(save_every=1, log_every=1, num_steps=6)
  with pytest.raises(Diverged, match="last 1 steps up to 2 changed nothing, .* the last checkpoint is 1; lower optim"):
    loop.train_and_evaluate(Run.of(config), str(tmp_path))
  assert workdir.latest_step(str(tmp_path)) == 1
  assert all(np.isfinite(x).all() for x in restore.restore_params(str(tmp_path), ema=False).values())
  assert [line["step"] for line in lines_of(str(tmp_path))] == [1]
  assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.full
def test_the_start_of_a_run_is_trained_first_and_once(tmp_path, environment):
  """One command trains the start and then the run; the same command resumes."""
  run, config = tmp_path / "run", "tests/tiny.py"
  flags = [f"--config={config}", f"--workdir={run}", f"--config.init_from=config:{config}:autoencoder"]
  done = call("train", environment, *flags, "--config.num_steps=4")
  assert done.returncode == 0, done.stderr
  first, second = (provenance.read(str(path)) for path in (run / "first", run))
  assert [event["event"] for event in first] == [event["event"] for event in second] == ["start", "end"]
  assert second[0]["init_from"][0]["objectives"] == ["reconstruction"]
  before, after = restore.restore_params(str(run / "first")), restore.restore_params(str(run))
  name = next(name for name in after if name.startswith("autoencoder") and np.ndim(after[name]) == 4)
  np.testing.assert_array_equal(before[name], after[name])
  run = run.rename(tmp_path / "moved")
  flags[1] = f"--workdir={run}"
  done = call("train", environment, *flags, "--config.num_steps=8")
  assert done.returncode == 0, done.stderr
  assert len(provenance.read(str(run / "first"))) == 2 and workdir.latest_step(run) == 8
