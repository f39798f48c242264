from __future__ import annotations

import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest
from absl import flags

from diffdis_jax import evaluate
from diffdis_jax.ablate import tables
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results, tasks
from diffdis_jax.evals.tasks import Section
from diffdis_jax.evals.zero_shot import ZeroShot
from diffdis_jax.run import digests
from tests.command_runs import call

pytest_plugins = ("tests.untrained", "tests.command_runs")

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
def test_records(monkeypatch, ema, kept):
  asked = []
  monkeypatch.setattr(evaluate.restore, "choose", lambda run, step, ema: (7, ema and kept))
  monkeypatch.setattr(evaluate.inference, "load", lambda path, **how: asked.append(how) or (Inference(), {}))
  kinds = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
  settings = {task: {"data": DATA, "seed": 2} for task in kinds}
  found = evaluate.evaluate(
    "run", [Section("set", task, each) for task, each in settings.items()], ema=ema, num_noise_samples=2
  )
  assert asked == [{"step": 7, "ema": ema and kept, "num_noise_samples": 2}]
  for task, kind in kinds.items():
    record = found[task]["set"]
    assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language", "protocol", "provenance"}
    assert (record["dataset"], record["pretrained"], record["task"], record["language"]) == ("set", "run", kind, "en")
    assert record["metrics"] == tasks.create(task, **settings[task]).run(Inference(), {})
    expected = {"steps": 1, "num_noise_samples": 2, "guidance": 1.0, "seed": 2, "num_images": 112, "checkpoint": 7}
    assert (expected | {"ema": ema and kept}).items() <= record["protocol"].items()
  assert json.loads(json.dumps(found)) == found


def test_hosts_that_find_other_data_sets_are_named(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(evaluate.processes, "differing", lambda mine: [1])
  with pytest.raises(UserError, match="other data sets than host 0: 1; this host finds zero_shot on a; put"):
    evaluate.evaluate("run", [Section("a", "zero_shot", {"data": DATA})])


def test_hosts_that_find_other_records_are_named(tmp_path, monkeypatch):
  """Each read its rows of the batches from its own, and host 0 measured them by its own labels."""
  (tmp_path / "made.array_record-00000-of-00001").write_bytes(b"records")
  digests.write(tmp_path)
  said = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(evaluate.processes, "differing", lambda text: said.append(text) or [])
  sets = [Section("a", "zero_shot", {"data": {**DATA, "name": "pairs", "path": str(tmp_path)}})]
  for content in (b"records", b"others"):
    (tmp_path / "made.array_record-00000-of-00001").write_bytes(content)
    digests.write(tmp_path)
    evaluate._check_same_on_all(sets)
  first, other = said
  assert first.startswith("zero_shot on a ") and first != other


def test_an_interruption_loses_no_set_that_is_measured(tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate.restore, "choose", lambda run, step, ema: (7, ema))
  monkeypatch.setattr(evaluate.inference, "load", lambda path, **how: (Inference(), {}))
  run = ZeroShot.run
  done = []

  def interrupted(self, inference, params):
    if done:
      raise KeyboardInterrupt
    done.append(self)
    return run(self, inference, params)

  monkeypatch.setattr(ZeroShot, "run", interrupted)
  asked = [Section(name, "zero_shot", {"data": DATA}) for name in ("first", "second")]
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate("run", asked, kept=results.ResultFile(f"{tmp_path}/F.json", resumes=False))
  assert list(results.read(f"{tmp_path}/F.json")["zero_shot"]) == ["first"]


def test_sections():
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


def test_data_of_the_runs_own_size_have_the_one_that_is_asked_for():
  data = {"name": "shapes", "image_size": 32}
  sets = {
    "a": {"task": "fid", "data": data},
    "b": {"task": "fid", "data": data | {"image_size": 48}},
    "c": {"task": "x"},
  }
  found = tasks.resized(sets, 32, 64)
  assert found == sets | {"a": {"task": "fid", "data": data | {"image_size": 64}}} and data["image_size"] == 32
  config = {"image_size": 32, "evals": sets}
  assert tables.changed(config, {"image_size": 64}) == {"image_size": 64, "evals": found}
  changes = {"image_size": 64, "evals.a.data.image_size": 16}
  assert tables.changed(config, changes)["evals"]["a"]["data"]["image_size"] == 16


def test_override():
  asked = [Section("a", "zero_shot", {"seed": 0, "classnames": ("x",)}), Section("b", "generation_accuracy", {})]
  assert tasks.override(asked, {"seed": 3, "templates": "F.json"}) == [
    Section("a", "zero_shot", {"seed": 3, "classnames": ("x",), "templates": "F.json"}),
    Section("b", "generation_accuracy", {"seed": 3}),
  ]
  with pytest.raises(UserError, match="--templates has no effect"):
    tasks.override(asked[1:], {"templates": "F.json"})
  with pytest.raises(UserError, match="unknown task 'zeroshot'; did you mean zero_shot?"):
    tasks.override([Section("a", "zeroshot", {})], {})


def test_one_reference_is_of_one_set():
  sets = [Section("a", "fid", {}), Section("b", "fid", {}), Section("a", "zero_shot", {})]
  assert tasks.override(sets[1:], {"reference": "F.npz"})[0].settings == {"reference": "F.npz"}
  with pytest.raises(UserError, match="--reference=F.npz is of one data set, and fid is measured on several"):
    tasks.override(sets, {"reference": "F.npz"})


def test_every_setting_of_an_evaluation_has_a_flag_with_its_help():
  """Except for objects, which no flag can give."""
  values = flags.FlagValues()
  with pytest.MonkeyPatch.context() as patch:
    of_kind = lambda a, b, f: (a, b, f and functools.partial(f, flag_values=values))
    patch.setattr(tasks, "KINDS", {name: of_kind(*kind) for name, kind in tasks.KINDS.items()})
    tasks.define_flags()
  for task, row in tasks.TASKS.items():
    assert {field.name for field in dataclasses.fields(row.evaluation)} - {*values} <= {"data"}, task
  assert all(values[name].help for name in values) and all(values[name].value is None for name in values)
  kinds = {"num_images": "int", "crop_pct": "float", "shuffle_labels": "bool", "classnames": "string"}
  assert {name: values[name].flag_type() for name in kinds} == kinds
  assert values["shots"].flag_type() == "comma separated list of strings"
  assert "zero_shot, retrieval, held_out_loss, diffusion_classifier, query_use: images to measure" in values[
    "num_images"
  ].help.replace("\n", " ")


@pytest.fixture
def command(run, environment):
  return functools.partial(call, "evaluate", environment, f"--workdir={run}")


def test_command_line(command, tmp_path):
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
    (["--generation_steps=9"], "--generation_steps has no effect on these tasks, which generate nothing; leave it out"),
    (["--compare=A.json,B.json"], "--workdir has no effect beside --compare, which reads results alone; leave it out"),
    (["--tasks=retreival"], "unknown task 'retreival'; did you mean retrieval?"),
  ],
)
def test_bad_input(command, tmp_path, flags, message):
  bad = command(f"--out={tmp_path / 'out.json'}", *flags)
  assert bad.returncode == 2 and not list(tmp_path.iterdir())
  assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and message in bad.stderr


def test_what_is_of_text_queries_has_no_effect_without_a_head():
  """`generate` has a --guidance too, which is that of images."""
  fid, both = [Section("coco", "fid", {})], ("generation", "discrimination")
  evaluate.check_effect(fid, both, ["query_steps", "generation_steps"])
  evaluate.check_effect(fid, ("generation",), ["generation_guidance"])
  for flag in ("guidance", "query_steps"):
    with pytest.raises(UserError, match=f"--{flag} has no effect: no text query"):
      evaluate.check_effect(fid, ("generation",), ["generation_steps", flag])
  evaluate.check_effect([Section("val", "held_out_loss", {}), *fid], both, ["query_steps"])
  with pytest.raises(UserError, match="--query_steps has no effect: no text query"):
    evaluate.check_effect([Section("val", "held_out_loss", {})], both, ["query_steps"])
  with pytest.raises(UserError, match="--query_steps has no effect: no text query"):
    evaluate.check_effect([Section("pets", "zero_shot", {})], ("contrastive",), ["query_steps"], is_clip=True)


@pytest.mark.parametrize("out", ["file/out.json", "file/new/out.json"])
def test_an_out_that_cannot_be_is_refused_before_anything_is_measured(tmp_path, out):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=f"--out={tmp_path}/file/out.json lies in no folder that exists"):
    results.check_out(str(tmp_path / out))
  results.check_out(str(tmp_path / "new" / "folder" / "out.json"))
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
  (tmp_path / "closed").mkdir(mode=0o500)
  if not os.access(tmp_path / "closed", os.W_OK):
    with pytest.raises(UserError, match="cannot write --out=.*: Permission denied"):
      results.check_out(str(tmp_path / "closed" / "new" / "out.json"))
