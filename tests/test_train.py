from __future__ import annotations

import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from diffdis_jax import evaluate, inference
from diffdis_jax.common import machine
from diffdis_jax.config import Run, read_fields
from diffdis_jax.data import build, shapes, sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import Diverged, UserError
from diffdis_jax.evals import tasks as evals
from diffdis_jax.evals import tasks as sections_of
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import flops as estimated
from diffdis_jax.run import checkpoint, provenance, restore, workdir
from diffdis_jax.structs import Batch
from diffdis_jax.training import evaluator, loop, start
from diffdis_jax.training.step import Trainer
from tests import steps, tiny
from tests.command_runs import STEPS, call
from tests.steps import build_trainer, config_of

pytest_plugins = ("tests.command_runs",)


def lines_of(run: str) -> list[dict[str, float]]:
  return [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]


def pixels(path: pathlib.Path) -> np.ndarray:
  with Image.open(path) as image:
    return np.asarray(image)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(config: ConfigDict, path: pathlib.Path, message: str) -> None:
  """The run is refused in one line, and leaves what was there, or was not there, as it was."""
  before = files_of(path) if path.exists() else None
  with pytest.raises(UserError, match=message) as error:
    loop.train_and_evaluate(Run.of(config), str(path))
  assert "\n" not in str(error.value)
  assert (files_of(path) if path.exists() else None) == before


def test_a_run_holds_what_the_readme_says(joint_run):
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
    if line["step"] == 1:  # it was compiled
      assert {line[name] for name in speeds} == {None}
    else:
      assert 0 <= line["data_wait"] <= 1 and line["steps_per_sec"] > 0
    # L_ITA is logged of rows with an image, and minimised over all: training/test_step.py has the exact relation.
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


def test_a_joint_run_starts_from_the_autoencoder_and_keeps_it(joint_run, autoencoder_run):
  expected = restore.restore_params(autoencoder_run)
  raw = restore.restore_params(autoencoder_run, ema=False)
  found = restore.restore_params(joint_run, ema=False)
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  kernel = "autoencoder.conv_in.kernel"
  assert (np.asarray(expected[kernel]) != np.asarray(raw[kernel])).any(), "the averaged ones are taken"
  assert (np.asarray(found["autoencoder.scale"]) != 1).all()
  assert {line["loss_l1"] > 0 for line in lines_of(autoencoder_run)} == {True}


def check_provenance(found: dict, run: str, autoencoder: str) -> None:
  """Check the provenance of the joint run by a command on one CPU device. The run's history knows its autoencoder."""
  known = provenance.code()
  assert {name: found[name] for name in known} == known and len(known["commit"]) == 40
  assert found["device"] == {"kind": "cpu", "count": 1} and found["processors"] >= 1
  fields = read_fields(run)
  of_joint = provenance.of_config(fields)
  trained = {"commits": [known["commit"]], "clean": known["clean"]}
  of_autoencoder = provenance.of_config(tiny.get_config("autoencoder").to_dict()) | trained | {"steps": 8}
  assert of_autoencoder.pop("init_from") == []
  assert found["run"] == of_joint | trained | {"steps": STEPS, "seed": 0, "init_from": [of_autoencoder]}
  assert found["run"]["config_hash"] != of_autoencoder["config_hash"] and of_autoencoder["objectives"] == [
    "reconstruction"
  ]
  assert provenance.read(run)[0]["init_from"] == found["run"]["init_from"]


def test_the_run_is_evaluated_and_generates_through_the_command_line(
  joint_run, autoencoder_run, joint_results, joint_images
):
  results = json.loads(joint_results.read_text())["zero_shot"]
  assert results.keys() == {"test", "unseen"}
  for record in results.values():
    assert 0 <= record["metrics"]["acc1"] <= record["metrics"]["acc5"] <= 1
    assert record["protocol"]["checkpoint"] == STEPS and record["protocol"]["ema"] is True
    check_provenance(record["provenance"], joint_run, autoencoder_run)
    assert record["pretrained"] == "joint" and "/" not in json.dumps(record["provenance"])

  assert {path.name for path in joint_images.iterdir()} == {"00000.png", "00001.png", "grid.png", "prompts.json"}
  first, second = (pixels(joint_images / f"0000{i}.png") for i in range(2))
  assert first.shape == second.shape == (16, 16, 3) and (first != second).any()


@pytest.mark.slow
def test_a_run_takes_what_was_compiled_before_it_for_the_devices_it_was_compiled_for(autoencoder_run, tmp_path, caplog):
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  config = tiny.get_config("autoencoder")
  trainer = Trainer(Run.of(config), sharding.make_mesh(**config.mesh, devices=jax.devices()[:1]))
  trainer.compile_ahead()
  loop.train_and_evaluate(Run.of(config), str(tmp_path), trainer=trainer)
  compiled = [message.split(" in ")[0] for message in caplog.messages if message.startswith("compiled")]
  assert sorted(compiled) == ["compiled the initialisation", "compiled the state", "compiled the training step"]
  found, expected = lines_of(str(tmp_path)), lines_of(autoencoder_run)  # of a process that has one device
  assert len(found) == len(expected) > 1
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose([one["loss"], one["grad_norm"]], [other["loss"], other["grad_norm"]], rtol=1e-3)


WATCHED, BEST = 5, "b/text_retrieval_recall@10"  # steps of watched_run, and the metric whose least it keeps


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory, environment) -> str:
  """Workdir of a run that is evaluated and saved at every step, and keeps the best step and the last.

  Its rates and its loss's weight are so high that parameters and their averages differ, and what is measured differs
  from step to step. So rounding decides which step is the best. Where it is the last, which another rule keeps too, the
  next seed is taken.
  """
  data = {"name": "shapes", "split": "test", "num_images": 64}
  added = [{"name": name, "task": task, "data": data} for name, task in (("a", "zero_shot"), ("b", "retrieval"))]
  added[0]["label_field"] = "colour"
  fields = {"objectives": ("discrimination",), "num_steps": WATCHED, "eval_every": 1, "save_every": 1}
  fields |= {"train_evals": ("test",), "optim.warmup_steps": 0, "optim.rates.text": 0.05}
  fields |= {"optim.rates.unet": 0.02, "optim.rates.new": 0.02, "loss.ita_weight": 0.03}
  fields |= {
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 1,
    "checkpoint.best_metric": BEST,
    "checkpoint.best_is": "min",
  }
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  flags += [f"--eval={json.dumps(section)}" for section in added]
  for seed in (3, 0, 1, 2, 4):  # where it was measured, far from the last in the first of these
    run = str(tmp_path_factory.mktemp("watched"))
    done = call("train", environment, "--config=tests/tiny.py", f"--workdir={run}", f"--config.seed={seed}", *flags)
    assert done.returncode == 0, done.stderr
    by_step = {step: values[BEST] for step, values in evaluations_of(run).items()}
    if by_step[WATCHED] > min(by_step.values()):
      return run
  raise AssertionError(f"the last step is always the best: {by_step}")


def evaluations_of(run: str) -> dict[int, dict[str, float]]:
  """Read the evaluations in metrics.jsonl by step."""
  found: dict[int, dict[str, float]] = {}
  for line in lines_of(run):
    values = {name: value for name, value in line.items() if "/" in name}
    found[line["step"]] = found.get(line["step"], {}) | values
  return found


@pytest.fixture(scope="module")
def recorded(watched_run) -> dict[int, dict[str, float]]:
  return evaluations_of(watched_run)


@pytest.mark.slow
def test_a_run_is_evaluated_as_evaluate_does_it_with_averaged_parameters(watched_run, recorded, monkeypatch):
  config = json.loads((pathlib.Path(watched_run) / "config.json").read_text())
  assert config["evals"]["a"]["data"]["image_size"] == 16
  assert sorted(recorded) == list(range(1, WATCHED + 1))
  for values in recorded.values():
    assert {name.split("/")[0] for name in values} == {"test", "a", "b"}
    assert {"test/acc1", "a/mean_per_class_recall", "a/acc5", "b/image_retrieval_recall@1"} <= values.keys()

  # On one device, as the run, since rounding may decide between two images; the second time with the first's programs.
  mesh = steps.make_mesh()
  monkeypatch.setattr(sharding, "make_mesh", lambda **axes: mesh)
  models, load = [], inference.load

  def load_once(*args, **how):
    model, params = load(*args, **how)
    models.append(model)
    return models[0], params

  monkeypatch.setattr(inference, "load", load_once)
  sections = sections_of.of_config({name: config["evals"][name] for name in ("test", "a", "b")}, tasks=None)
  averaged, raw = (evaluate.evaluate(watched_run, sections, step=WATCHED, ema=ema) for ema in (True, False))
  named = lambda results: {
    f"{name}/{metric}": value
    for sets in results.values()
    for name, record in sets.items()
    for metric, value in record["metrics"].items()
  }
  assert named(averaged) == pytest.approx(recorded[WATCHED])
  differences = [value - recorded[WATCHED][name] for name, value in named(raw).items()]
  assert np.abs(differences).max() > 1.5 / 64, "else it would not show which parameters were measured"


@pytest.mark.slow
def test_the_step_of_the_best_recorded_metric_is_kept(watched_run, recorded):
  by_step = {step: values[BEST] for step, values in recorded.items()}
  kept = [int(path.name) for path in (pathlib.Path(watched_run) / "checkpoints").iterdir() if path.name.isdigit()]
  best, last = sorted(kept)
  assert last == WATCHED and by_step[best] == min(by_step.values())


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags, message",
  [
    (["--config=tests/tiny.py", "--eval={"], "--eval={ is not JSON"),
    (["--config=tests/tiny.py", '--eval={"name": "a", "task": "clipscore"}'], "unknown task 'clipscore'"),
    (["--config=tests/tiny.py", "--config.optim.allow_uninitialized=^$"], "optim.groups freezes"),
    (["--config=tests/tiny.py", "--config.batchsize=3"], "unknown config key batchsize; did you mean batch_size?"),
    (["--config=tests/tiny.py:autoencodr"], "unknown argument 'autoencodr'; known: autoencoder"),
    (["--config=tests/tiny.py", "--config.image_size=18"], "image_size is 18"),
    (["--config=tests/tiny.py"], "--workdir (folder of the run; created, or resumed if it holds one) is missing"),
  ],
)
def test_bad_command_lines_are_one_line_and_leave_nothing(environment, tmp_path, flags, message):
  workdir = [] if "workdir" in message else [f"--workdir={tmp_path / 'run'}"]
  done = call("train", environment, *flags, *workdir)
  assert done.returncode == 2, done.stderr
  line = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(line) == 1 and message in line[0]
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 12}, "batch_size is 12; .* multiple of 8, such as"),
    ({"image_size": 18}, "image_size is 18; .* multiple of 4, such as"),
    ({"data.max_length": 1000}, "data.max_length is 1000; it must be from 2 to model.text_encoder.max_length"),
    ({"seed": -1}, "seed is -1; it must be at least 0 and at most 4294967295"),
    ({"mesh.fsdp": 3}, "mesh data=-1, fsdp=3, tensor=1 takes 3 devices .* but there are 8"),
    ({"model.dtype": "float8"}, "model.dtype is 'float8'; it must be one of float32, bfloat16"),
    ({"data.name": "shape"}, "unknown data source 'shape'; there are shapes, pairs"),
    ({"data.augment.crop": "all"}, "data.augment.crop is 'all'; it must be one of centre, random, random_resized"),
    ({"data.discrimination_view": "other"}, "data.discrimination_view is 'other'; it must be one of shared, own"),
    ({"data.mixture": {"a": {"weight": 0}}}, "data.mixture.a.weight is 0; it must be above 0"),
    ({"data.mixture": {"a": {"pth": "x"}}}, "data.mixture.a: .*'pth'"),
    ({"data.split": "training"}, "shapes has no split 'training'"),
    ({"data.caption_field": ("caption",)}, "a data source has no field 'caption_field'; did you mean caption_fields?"),
    ({"data.num_images": "16"}, "num_images is '16'; it must be a whole number"),
    ({"data.name": "pairs", "data.path": "nowhere"}, "no prepared data set in 'nowhere'"),
    ({"train_evals": ("tset",)}, "train_evals names tset; evals has generated, held_out, test, test_retrieval, unseen"),
    ({"train_evals": ("test",), "objectives": ("generation",)}, "train_evals has test, whose task zero_shot measures"),
    (
      {"train_evals": ("generated",), "objectives": ("discrimination",)},
      "generated, whose task generation_accuracy measures",
    ),
    ({"image_diffusion.schedule": "cosin"}, "image_diffusion.schedule is 'cosin'; it must be one of scaled_linear"),
    ({"text_diffusion.schedule": "cosin"}, "text_diffusion.schedule is 'cosin'; it must be one of scaled_linear"),
    ({"text_diffusion.target": "date"}, "text_diffusion.target is 'date'; it must be one of data, noise"),
    ({"inference.num_noise_samples": 0}, "inference.num_noise_samples is 0"),
    ({"inference.steps": 0}, "inference.steps is 0"),
    ({"inference.generation_steps": 1000}, "inference.generation_steps is 1000"),
    ({"optim.accumulate": 0}, "optim.accumulate is 0"),
    ({"save_every": 0}, "save_every is 0; it must be at least 1"),
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
def test_a_run_that_is_made_longer_ends_in_the_bits_of_one_that_was_as_long(tmp_path, caplog):
  """The rates do not fall, so that its length changes nothing before its end."""
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
  expected, found = (restore.restore_params(run, ema=False) for run in (whole, longer))
  assert expected.keys() == found.keys()
  assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
  assert [line["step"] for line in lines_of(longer)] == [1, 2, 3, 4, 5, 6]
  starts = [event for event in provenance.read(longer) if event["event"] == "start"]
  assert [(start["step"], start["num_steps"]) for start in starts] == [(0, 4), (4, 6)]

  config.num_steps = 4
  refused(config, pathlib.Path(longer), "num_steps is 6 there and 4 here")


def test_a_checkpoint_without_its_commit_mark(joint_run, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(joint_run, copy)
  (copy / "checkpoints" / str(STEPS) / "commit_success.txt").unlink()
  with pytest.raises(UserError, match=f"checkpoint {STEPS} in .* was never committed"):
    inference.load(str(copy), step=STEPS)
  earlier = [path for path in (copy / "checkpoints").iterdir() if path.name.isdigit() and path.name != str(STEPS)]
  for path in earlier:
    shutil.rmtree(path)
  config = tiny.get_config()
  config.init_from = str(copy)
  refused(config, tmp_path / "other", "no checkpoint in .*; train first")


@pytest.mark.parametrize("case", ["nothing there", "nothing in common", "other shapes"])
def test_init_from_that_does_not_fit(tmp_path, autoencoder_run, joint_run, case):
  config = tiny.get_config("autoencoder")
  config.init_from, message = autoencoder_run, ""
  if case == "nothing there":
    config.init_from, message = str(tmp_path), "no checkpoint in"
  elif case == "other shapes":
    config.model.autoencoder.widths = (16,)
    message = r"autoencoder\.\S+ has shape .*8.* there and .*16.* in this config; use the same model section"
  else:
    config.init_from = str(without_autoencoder(joint_run, tmp_path / "text_only"))
    message = "has no parameter of this network; it holds text_encoder"
  refused(config, tmp_path / "run", message)


def without_autoencoder(run: str, copy: pathlib.Path) -> pathlib.Path:
  params = restore.restore_params(run)
  text = {name: value for name, value in params.items() if name.startswith("text_encoder.")}
  with checkpoint.Checkpointer(str(copy)) as checkpointer:
    checkpointer.save(1, steps.TrainState(step=1, params=text, ema={}, opt_state=()))
  return copy


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


@pytest.mark.slow
def test_accuracy_falls_to_chance_with_images_shuffled_against_labels():
  """The leak test: whatever else than an image's pixels tells its label would keep accuracy up.

  The smallest network that learns anything: colours of shapes against eight fixed text queries.
  """
  changes = {"batch_size": 64, "num_steps": 100, "loss.image_dropout": 0.0, "optim.rates.new": 5e-3}
  changes |= {"optim.warmup_steps": 10, "optim.groups": (("^autoencoder|^text_encoder", "frozen"), (".*", "new"))}
  changes |= {"model.unet.widths": (16,), "model.alignment.width": 32, "model.text_encoder.width": 64}
  config = tiny.get_config()
  config.objectives = ("discrimination",)
  config.update_from_flattened_dict(changes)
  trainer = steps.Trainer(config)
  source = sources.open_source(name="shapes", split="train", image_size=config.image_size)
  tokenizer, rng = Tokenizer(config.data.max_length), np.random.default_rng(0)
  text = {name: value for name, value in trainer.initial().params.items() if name.startswith("text_encoder.")}
  state = trainer.step.with_params({**trainer.step.init_params(jax.random.key(0)), **text})
  batches = []
  for _ in range(config.num_steps):
    records = [source[int(i)] for i in rng.integers(0, len(source), config.batch_size)]
    tokens = tokenizer([record["colour"] for record in records])
    batches.append(Batch(image=np.stack([record["image"] for record in records]), tokens=tokens))
  state, _ = trainer.run(state, *batches)

  n = 224
  data = {"name": "shapes", "split": "test", "image_size": config.image_size, "num_images": n}
  section = {"task": "zero_shot", "data": data, "label_field": "colour", "templates": ("{}",)}
  section["classnames"] = tuple(shapes.COLOURS)
  model = steps.make_inference(config, mesh=trainer.mesh)
  accuracy = lambda **settings: evals.create(**section, **settings).run(model, state.params)
  chance = 1 / len(shapes.COLOURS)
  bound = chance + 4 * math.sqrt(chance * (1 - chance) / n)
  assert accuracy()["acc1"] > 0.3 > bound
  for seed in range(3):
    assert accuracy(shuffle_labels=True, seed=seed)["acc1"] < bound


@pytest.mark.slow
def test_operations_that_are_repeated_to_save_memory_count_once():
  """Operations of a convolution and a product are in test_flops; here, which step is counted."""
  config = tiny.get_config()
  mesh = steps.make_mesh(data=2)
  trainer = build_trainer(config, mesh)
  plain = estimated.trace_train(trainer).operations
  assert estimated.count(trainer.traced.jaxpr) == pytest.approx(plain)
  config.model.remat = "full"
  repeats = build_trainer(config, mesh)
  assert estimated.count(repeats.traced.jaxpr) > plain / 0.95
  assert estimated.trace_train(repeats).operations == pytest.approx(plain), "preflight's MFU"


def test_a_run_that_fails_reads_no_further_batches(tmp_path, monkeypatch):
  """Otherwise the program's end would wait for batches, and worker processes would live on in a notebook."""
  opened = []

  def open_loader(*args, **kwargs):
    opened.append(build.open_loader(*args, **kwargs))
    return opened[-1]

  def fail(*args):
    raise UserError("no such evaluation")

  monkeypatch.setattr(start, "open_loader", open_loader)
  monkeypatch.setattr(evaluator, "Evaluator", fail)
  with pytest.raises(UserError, match="no such evaluation"):
    loop.train_and_evaluate(Run.of(tiny.get_config()), str(tmp_path))
  with pytest.raises(ValueError, match="closed"):
    next(opened[0])


@pytest.mark.full
def test_what_a_run_starts_from_is_trained_first_and_once(tmp_path, environment):
  """Own pictures from scratch do so: one command trains both, and its second call resumes."""
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
