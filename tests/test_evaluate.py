from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

from diffdis_jax import evaluate
from diffdis_jax.errors import UserError
from diffdis_jax.evals import registry as evals
from diffdis_jax.evals import results

pytest_plugins = ("tests.untrained",)

DATA = {"name": "shapes", "split": "test", "image_size": 32, "num_images": 112}


class Inference:
  """Random embeddings."""

  image_size = 32
  max_length = 16
  protocol = {"steps": 1, "num_noise_samples": 2, "guidance": 1.0}

  def embed_texts(self, params, tokens):
    return np.random.default_rng(0).normal(size=(len(tokens), 8)).astype(np.float32)

  def embed_images(self, params, images, *, seed):
    return np.random.default_rng(seed).normal(size=(len(images), 8)).astype(np.float32)


@pytest.mark.parametrize("ema, kept", [(True, True), (False, True), (True, False)])
def test_records(tmp_path, monkeypatch, ema, kept):
  saved = tmp_path / "7"
  (saved / "ema" if kept else saved).mkdir(parents=True)
  asked = []
  monkeypatch.setattr(evaluate.restore, "find", lambda workdir, step: saved)
  monkeypatch.setattr(evaluate.inference, "load", lambda path, **how: asked.append(how) or (Inference(), {}))
  tasks = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
  sections = {task: {"task": task, "data": DATA, "seed": 2} for task in tasks}
  found = evaluate.evaluate("run", [("set", section) for section in sections.values()], ema=ema, num_noise_samples=2)
  assert asked == [{"step": 7, "ema": ema and kept, "num_noise_samples": 2}]
  for task, kind in tasks.items():
    record = found[task]["set"]
    assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language", "protocol", "provenance"}
    assert (record["dataset"], record["pretrained"], record["task"], record["language"]) == ("set", "run", kind, "en")
    assert record["metrics"] == evals.create(**sections[task]).run(Inference(), {})
    expected = {"steps": 1, "num_noise_samples": 2, "guidance": 1.0, "seed": 2, "num_images": 112, "checkpoint": 7}
    assert (expected | {"ema": ema and kept}).items() <= record["protocol"].items()
  assert json.loads(json.dumps(found)) == found


def test_an_interruption_loses_no_set_that_is_measured(tmp_path, monkeypatch):
  (tmp_path / "7").mkdir()
  monkeypatch.setattr(evaluate.restore, "find", lambda workdir, step: tmp_path / "7")
  monkeypatch.setattr(evaluate.inference, "load", lambda path, **how: (Inference(), {}))
  run = evals.ZeroShot.run
  done = []

  def interrupted(self, inference, params):
    if done:
      raise KeyboardInterrupt
    done.append(self)
    return run(self, inference, params)

  monkeypatch.setattr(evals.ZeroShot, "run", interrupted)
  write = functools.partial(results.write, f"{tmp_path}/F.json")
  sections = [(name, {"task": "zero_shot", "data": DATA}) for name in ("first", "second")]
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate("run", sections, measured=write)
  assert list(results.read(f"{tmp_path}/F.json")["zero_shot"]) == ["first"]


def test_sections():
  config = {"evals": {"a": {"task": "zero_shot"}, "b": {"task": "agreement"}, "c": {"task": "zero_shot"}}}
  select = lambda tasks: [name for name, _ in evaluate.sections_of_config(config["evals"], tasks=tasks)]
  assert select(None) == ["a", "b", "c"] and select(["zero_shot"]) == ["a", "c"]
  with pytest.raises(UserError, match="no data set for retrieval, only for agreement, zero_shot"):
    select(["zero_shot", "retrieval"])
  with pytest.raises(UserError, match="names no data set"):
    evaluate.sections_of_config({}, tasks=None)

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
    assert set(names) <= set(inspect.signature(evals.EVALS[task]).parameters)
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
  good = command(
    run,
    out,
    "--noema",
    "--num_images=50",
    "--num_noise_samples=2",
    "--shuffle_labels",
    "--nonormalize_query",
    f"--text_cache={tmp_path}/texts",
  )
  assert good.returncode == 0, good.stderr
  assert len(list((tmp_path / "texts").glob("*.npy"))) == 1
  protocol = json.loads(out.read_text())["zero_shot"]["few"]["protocol"]
  expected = {"num_images": 50, "num_classes": 56, "num_noise_samples": 2, "shuffle_labels": True, "ema": False}
  expected["normalize_query"] = False
  assert expected.items() <= protocol.items()
  assert [path.name for path in out.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--data=nowhere", "--split=test"], "no prepared data set in 'nowhere'"),
    (["--split=test"], "give --data too"),
    (["--step=9"], "no checkpoint 9"),
    (["--query_steps=0"], "query_steps"),
  ],
)
def test_bad_input(run, tmp_path, flags, message):
  bad = command(run, tmp_path / "out.json", *flags)
  assert bad.returncode == 2 and not list(tmp_path.iterdir())
  assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and message in bad.stderr
