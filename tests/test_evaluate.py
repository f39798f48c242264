from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import untrained

from diffdis_jax import evals, evaluate, inference
from diffdis_jax.structs import UserError

DATA = {"name": "shapes", "split": "test", "image_size": 32, "num_images": 112}
ZERO_SHOT = {"task": "zero_shot", "data": DATA, "seed": 2}
RETRIEVAL = {"task": "retrieval", "data": DATA, "seed": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("run"))
  untrained.make_run(path)
  return path


def test_records(run):
  results = evaluate.evaluate(run, [("first", ZERO_SHOT), ("first", RETRIEVAL)], ema=False, draws=2, batch_size=32)
  model, params = inference.load(run, ema=False, draws=2)
  for task, kind, section in (
    ("zero_shot", "zeroshot_classification", ZERO_SHOT),
    ("retrieval", "zeroshot_retrieval", RETRIEVAL),
  ):
    record = results[task]["first"]
    assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language", "protocol"}
    assert (record["dataset"], record["task"], record["language"]) == ("first", kind, "en")
    assert record["metrics"] == pytest.approx(evals.make(**section).run(model, params), abs=0.02)
    expected = {"steps": 1, "draws": 2, "guidance": 1.0, "seed": 2, "num_images": 112, "checkpoint": 3, "ema": False}
    assert expected.items() <= record["protocol"].items()
  assert json.loads(json.dumps(results)) == results


def test_leak_test_on_the_real_path(run):
  """The discriminative path of an untrained network knows nothing: at chance, shuffled or not."""
  section = ZERO_SHOT | {"data": DATA | {"num_images": 560}}
  for shuffle in (False, True):
    results = evaluate.evaluate(run, [("set", section | {"shuffle_labels": shuffle})], ema=False)
    assert results["zero_shot"]["set"]["metrics"]["acc1"] < 0.1
    assert results["zero_shot"]["set"]["protocol"]["shuffle_labels"] is shuffle


def test_sections():
  config = {"evals": {"a": {"task": "zero_shot"}, "b": {"task": "agreement"}, "c": {"task": "zero_shot"}}}
  select = lambda tasks: [name for name, _ in evaluate.sections_of_config(config, tasks=tasks)]
  assert select(None) == ["a", "b", "c"] and select(["zero_shot"]) == ["a", "c"]
  with pytest.raises(UserError, match="no data set for retrieval, only for agreement, zero_shot"):
    select(["zero_shot", "retrieval"])
  with pytest.raises(UserError, match="names no data set"):
    evaluate.sections_of_config({"evals": {}}, tasks=None)

  (name, section), _ = evaluate.sections_of_folder("x/emoji", "val", tasks=["zero_shot", "retrieval"], image_size=32)
  assert name == "emoji/val" and section["task"] == "zero_shot" and section["data"]["path"] == "x/emoji"
  with pytest.raises(UserError, match="--data needs --split"):
    evaluate.sections_of_folder("x/emoji", None, tasks=["zero_shot"], image_size=32)
  with pytest.raises(UserError, match="takes no --data"):
    evaluate.sections_of_folder("x/emoji", "val", tasks=["agreement"], image_size=32)


def test_override():
  sections = [("a", {"task": "zero_shot", "seed": 0, "classnames": ("x",)}), ("b", {"task": "agreement"})]
  changed = evaluate.override(sections, {"seed": 3, "templates": "F.json"})
  assert changed == [
    ("a", {"task": "zero_shot", "seed": 3, "classnames": ("x",), "templates": "F.json"}),
    ("b", {"task": "agreement", "seed": 3}),
  ]
  with pytest.raises(UserError, match="--templates has no effect"):
    evaluate.override(sections[1:], {"templates": "F.json"})
  with pytest.raises(UserError, match="unknown task 'zeroshot'; did you mean zero_shot?"):
    evaluate.override([("a", {"task": "zeroshot"})], {})


def test_every_setting_that_a_flag_may_set_is_one():
  for task, names in evaluate.SETTINGS.items():
    parameters = evals.EVALS[task].__init__.__kwdefaults__
    assert set(names) <= set(parameters)
  assert set(evaluate.SETTINGS) == set(evals.EVALS)


def command(run, out, *flags):
  call = [sys.executable, "-m", "diffdis_jax.evaluate", f"--workdir={run}", f"--out={out}", *flags]
  return subprocess.run(call, capture_output=True, text=True)


def test_command_line(run, tmp_path):
  names = tmp_path / "names.json"
  names.write_text('["red star", "blue ring", "red star"]')
  bad = command(run, tmp_path / "out.json", f"--classnames={names}")
  assert bad.returncode == 2 and not (tmp_path / "out.json").exists()
  assert bad.stderr == "error: class list with duplicates: 'red star'; each class name should occur once\n"

  out = tmp_path / "new" / "out.json"
  good = command(run, out, "--noema", "--num_images=50", "--draws=2", "--shuffle_labels")
  assert good.returncode == 0, good.stderr
  protocol = json.loads(out.read_text())["zero_shot"]["few"]["protocol"]
  expected = {"num_images": 50, "num_classes": 56, "draws": 2, "shuffle_labels": True, "ema": False}
  assert expected.items() <= protocol.items()
  assert [path.name for path in out.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--data=nowhere", "--split=test"], "no prepared data set in 'nowhere'"),
    (["--split=test"], "give --data too"),
    (["--step=9"], "no checkpoint 9"),
    (["--steps=0"], "steps"),
  ],
)
def test_bad_input(run, tmp_path, flags, message):
  bad = command(run, tmp_path / "out.json", *flags)
  assert bad.returncode == 2 and not list(tmp_path.iterdir())
  assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and message in bad.stderr


def test_zeros_tell_nothing(run):
  """The averages of this run are zeros, so every image has the same query: a tie counts as wrong."""
  results = evaluate.evaluate(run, [("set", ZERO_SHOT)])
  record = results["zero_shot"]["set"]
  assert record["protocol"]["ema"] is True and record["metrics"]["acc1"] <= 1 / 56 + 1e-6
  assert np.isfinite(list(record["metrics"].values())).all()
