from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from diffdis_jax import evaluate
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results, tasks
from diffdis_jax.evals.tasks import Section
from diffdis_jax.evals.zero_shot import ZeroShot
from tests.command_runs import call

pytest_plugins = ("tests.untrained", "tests.command_runs")

DATA = {"name": "shapes", "split": "test", "image_size": 32, "num_images": 112}


class Inference:
  """Return random embeddings."""

  max_length, protocol = 16, {"steps": 1, "num_noise_samples": 2, "guidance": 1.0}

  def __init__(self, image_size=32):
    self.image_size = image_size

  def embed_texts(self, params, tokens):
    return np.random.default_rng(0).normal(size=(len(tokens), 8)).astype(np.float32)

  def embed_images(self, params, images, *, seed):
    return np.random.default_rng(seed).normal(size=(len(images), 8)).astype(np.float32)


@pytest.mark.parametrize("ema, kept", [(True, True), (False, True), (True, False)])
def test_the_records_of_results_have_clip_benchmarks_fields(monkeypatch, ema, kept):
  asked = []
  monkeypatch.setattr(evaluate.restore, "choose", lambda run, step, ema: (7, ema and kept))
  monkeypatch.setattr(evaluate.inference, "load", lambda path, **how: asked.append(how) or (Inference(), {}))
  kinds = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
  settings = {task: {"data": DATA, "seed": 2} for task in kinds}
  results_ = evaluate.evaluate(
    "run", [Section("set", task, how) for task, how in settings.items()], ema=ema, num_noise_samples=2
  )
  assert asked == [{"step": 7, "ema": ema and kept, "num_noise_samples": 2}]
  for task, kind in kinds.items():
    record = results_[task]["set"]
    assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language", "protocol", "provenance"}
    assert (record["dataset"], record["pretrained"], record["task"], record["language"]) == ("set", "run", kind, "en")
    assert record["metrics"] == tasks.create(task, **settings[task]).run(Inference(), {})
    expected = {"steps": 1, "num_noise_samples": 2, "guidance": 1.0, "seed": 2, "num_images": 112, "checkpoint": 7}
    assert (expected | {"ema": ema and kept}).items() <= record["protocol"].items()
  assert json.loads(json.dumps(results_)) == results_


def test_an_interruption_loses_no_measured_set(tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate.restore, "choose", lambda run, step, ema: (7, ema))
  monkeypatch.setattr(evaluate.inference, "load", lambda path, **how: (Inference(), {}))
  run = ZeroShot.run
  measured = []

  def interrupted(self, inference, params):
    if measured:
      raise KeyboardInterrupt
    measured.append(self)
    return run(self, inference, params)

  monkeypatch.setattr(ZeroShot, "run", interrupted)
  asked = [Section(name, "zero_shot", {"data": DATA}) for name in ("first", "second")]
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate("run", asked, kept=results.ResultFile(f"{tmp_path}/F.json", resumes=False))
  assert list(results.read(f"{tmp_path}/F.json")["zero_shot"]) == ["first"]


def test_the_evaluations_of_a_config_and_of_a_folder_are_chosen_by_task():
  config = {"a": {"task": "zero_shot"}, "b": {"task": "generation_accuracy"}, "c": {"task": "zero_shot"}}
  select = lambda names: [section.dataset for section in tasks.of_config(config, tasks=names)]
  assert select(None) == ["a", "b", "c"] and select(["zero_shot"]) == ["a", "c"]
  with pytest.raises(UserError, match="no data set for retrieval, only for generation_accuracy, zero_shot"):
    select(["zero_shot", "retrieval"])
  with pytest.raises(UserError, match="names no data set"):
    tasks.of_config({}, tasks=None)

  section, _ = tasks.of_folder("x/emoji", "val", tasks=["zero_shot", "retrieval"], image_size=32)
  assert (
    section.dataset == "emoji/val" and section.task == "zero_shot" and section.settings["data"]["path"] == "x/emoji"
  )
  with pytest.raises(UserError, match="--data needs --split"):
    tasks.of_folder("x/emoji", None, tasks=["zero_shot"], image_size=32)


def test_flags_override_the_settings_of_evaluations():
  asked = [Section("a", "zero_shot", {"seed": 0, "classnames": ("x",)}), Section("b", "generation_accuracy", {})]
  assert tasks.override(asked, {"seed": 3, "templates": "F.json"}) == [
    Section("a", "zero_shot", {"seed": 3, "classnames": ("x",), "templates": "F.json"}),
    Section("b", "generation_accuracy", {"seed": 3}),
  ]
  with pytest.raises(UserError, match="--templates has no effect"):
    tasks.override(asked[1:], {"templates": "F.json"})
  with pytest.raises(UserError, match="unknown task 'zeroshot'; did you mean zero_shot?"):
    tasks.override([Section("a", "zeroshot", {})], {})


def test_a_reference_for_several_sets_is_refused():
  sets = [Section("a", "fid", {}), Section("b", "fid", {}), Section("a", "zero_shot", {})]
  assert tasks.override(sets[1:], {"reference": "F.npz"})[0].settings == {"reference": "F.npz"}
  with pytest.raises(UserError, match="--reference=F.npz is of one data set, and fid is measured on several"):
    tasks.override(sets, {"reference": "F.npz"})


@pytest.fixture
def command(run, environment):
  return functools.partial(call, "evaluate", environment, f"--workdir={run}")


def test_the_command_writes_results_and_refuses_wrong_names(command, tmp_path):
  names = tmp_path / "names.json"
  names.write_text('["red star", "blue ring", "red star"]')
  bad = command(f"--out={tmp_path / 'out.json'}", f"--classnames={names}")
  assert bad.returncode == 2 and not (tmp_path / "out.json").exists()
  assert bad.stderr == "error: class list with duplicates: 'red star'; each class name should occur once\n"

  out = tmp_path / "new" / "out.json"
  good = command(
    f"--out={out}",
    "--noema",
    "--num_images=50",
    "--num_noise_samples=2",
    "--shuffle_labels",
    "--nonormalize_query",
  )
  assert good.returncode == 0, good.stderr
  protocol = json.loads(out.read_text())["zero_shot"]["few"]["protocol"]
  expected = {"num_images": 50, "num_classes": 56, "num_noise_samples": 2, "shuffle_labels": True, "ema": False}
  expected["normalize_query"] = False
  assert expected.items() <= protocol.items()
  assert [path.name for path in out.parent.iterdir()] == ["out.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags, message",
  [
    (["--data=nowhere", "--split=test"], "no prepared data set in 'nowhere'"),
    (["--split=test"], "give --data too"),
    (["--tasks=long_tail", "--split=val"], "give --data too, or, for long_tail, add the split by --eval"),
    (["--step=9"], "no checkpoint 9"),
    (["--query_steps=0"], "--query_steps is 0; it must be at least 1"),
    (["--image_size=0"], "image_size is 0"),
    (["--steps=3"], "did you mean --query_steps?"),
    (
      ["--generation_steps=9"],
      "--generation_steps has no effect: no images are generated for these tasks of this run; ",
    ),
    (["--compare=A.json,B.json"], "--workdir has no effect beside --compare, which reads results alone; leave it out"),
    (["--tasks=retreival"], "unknown task 'retreival'; did you mean retrieval?"),
  ],
)
def test_wrong_input_is_refused_in_one_line(command, tmp_path, flags, message):
  bad = command(f"--out={tmp_path / 'out.json'}", *flags)
  assert bad.returncode == 2 and not list(tmp_path.iterdir())
  assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and message in bad.stderr


def test_flags_of_text_queries_are_refused_without_a_head():
  """The flag --guidance is for text queries here; in `generate` it is for images."""
  fid, objectives = [Section("coco", "fid", {})], ("generation", "discrimination")
  evaluate.check_sampling(fid, objectives, {"query_steps": 3, "generation_steps": 3})
  evaluate.check_sampling(fid, ("generation",), {"generation_guidance": 2.0})
  for flag in ("guidance", "query_steps"):
    with pytest.raises(UserError, match=f"--{flag} has no effect: no text queries"):
      evaluate.check_sampling(fid, ("generation",), {"generation_steps": 3, flag: 3})
  evaluate.check_sampling([Section("val", "held_out_loss", {}), *fid], objectives, {"query_steps": 3})
  with pytest.raises(UserError, match="--query_steps has no effect: no text queries"):
    evaluate.check_sampling([Section("val", "held_out_loss", {})], objectives, {"query_steps": 3})


@pytest.mark.parametrize("out", ["file/out.json", "file/new/out.json"])
def test_an_out_that_cannot_be_written_is_refused_before_measuring(tmp_path, out):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=f"--out={tmp_path}/file/out.json lies in no folder that exists"):
    results.check_out(str(tmp_path / out))
  results.check_out(str(tmp_path / "new" / "folder" / "out.json"))
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
