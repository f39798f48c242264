"""Test that evaluate measures a suite, resumes a killed measurement, and refuses wrong input."""

from __future__ import annotations

import json
import types

import pytest
from absl import flags

from diffdis_jax import evaluate
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.evals.zero_shot import ZeroShot
from tests import benchmark_sets
from tests.command_runs import call
from tests.test_evaluate import Inference

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.untrained", "tests.inception_weights", "tests.command_runs")
CAPTIONS = {1: ["a red star", "a star"], 2: ["a blue ring"]}


def test_the_paper_suite(run, environment, tmp_path):
  root, out = tmp_path / "root", tmp_path / "new/F.json"
  benchmark_sets.labelled_wds(root, "dtd")
  benchmark_sets.captioned_wds(root / "flickr30k", CAPTIONS)
  flags = [f"--workdir={run}", "--suite=paper", f"--data_root={root}", f"--out={out}", "--batch_size=8"]
  refused = call("evaluate", environment, *flags)
  message = (
    f"error: dtd in {root}/wds_dtd has 4 images, and should have 1,880; download it again, or give --incomplete to"
  )
  assert refused.returncode == 2 and not out.parent.exists()
  assert refused.stderr.splitlines()[-1] == f"{message} measure what is there"
  done = call("evaluate", environment, *flags, "--incomplete")
  assert done.returncode == 0, done.stderr
  assert "paper: not in" in done.stderr and "imagenet1k" in done.stderr
  results = json.loads(out.read_text())
  assert {task: [*records] for task, records in results.items()} == {
    "zero_shot": ["dtd", "mean_of_1"],
    "retrieval": ["flickr30k", "mean_of_1"],
  }
  record = results["zero_shot"]["dtd"]
  assert record["metrics"]["acc1"] == results["zero_shot"]["mean_of_1"]["metrics"]["mean"]
  assert {"num_images": 4, "num_classes": 47, "checkpoint": 3, "steps": 1}.items() <= record["protocol"].items()
  assert len(record["protocol"]["weights"]) == 64
  table = (tmp_path / "new/F.md").read_text()
  assert "mean of 1: " in table and "retrieval, Flickr30k, image_retrieval_recall@1" in table
  assert sorted(path.name for path in out.parent.iterdir()) == ["F.json", "F.md"]


@pytest.fixture
def quick(monkeypatch):
  """Replace the model by random embeddings, and the tokenizer by `list`."""
  monkeypatch.setattr(evaluate.restore, "choose", lambda run, step, ema: (7, ema))
  monkeypatch.setattr(evaluate.inference, "load", lambda path, **how: (Inference(8), {}))
  monkeypatch.setattr(evaluate.result_files, "fingerprint", lambda params: "weights")
  monkeypatch.setattr(base, "Tokenizer", lambda length: list)


def use_flags(monkeypatch, **values):
  """Set the command line's flags in this process."""

  class Flags:
    def __getattr__(self, name):
      return values.get(name)

    def __getitem__(self, name):
      return types.SimpleNamespace(value=values.get(name), present=name in values)

  monkeypatch.setattr(evaluate, "FLAGS", Flags())
  monkeypatch.setattr(flags, "FLAGS", Flags())


def run_of(*objectives):
  return types.SimpleNamespace(evals={}, objectives=objectives, image_size=8)


def measure(monkeypatch, root, out, suite="zero_shot12"):
  use_flags(monkeypatch, suite=suite, data_root=str(root), out=str(out))
  sections = evaluate.read_sections(run_of("discrimination"))
  evaluate.measure_suite("runs/mine", sections, str(out), incomplete=True)
  return json.loads(out.read_text())


def test_a_second_call_measures_the_missing_sets(monkeypatch, quick, tmp_path):
  for name in ("cifar10", "dtd", "pets"):
    benchmark_sets.labelled_wds(tmp_path, name)
  out, measured, run = tmp_path / "F.json", [], ZeroShot.run

  def killed_at(count):
    def counted(self, inference, params):
      if len(measured) == count:
        raise KeyboardInterrupt
      measured.append(len(self.names))
      return run(self, inference, params)

    monkeypatch.setattr(ZeroShot, "run", counted)

  killed_at(2)
  with pytest.raises(KeyboardInterrupt):
    measure(monkeypatch, tmp_path, out)
  assert measured == [10, 47] and [*json.loads(out.read_text())["zero_shot"]] == ["cifar10", "dtd"]
  assert not (tmp_path / "F.md").exists()
  killed_at(9)
  results = measure(monkeypatch, tmp_path, out)
  assert measured == [10, 47, 37] and [*results["zero_shot"]] == ["cifar10", "dtd", "pets", "mean_of_3"]
  assert "|  | mine |" in (tmp_path / "F.md").read_text()
  assert measure(monkeypatch, tmp_path, out) == results and len(measured) == 3

  before = out.read_bytes()
  monkeypatch.setattr(evaluate.result_files, "fingerprint", lambda params: "others")
  with pytest.raises(
    UserError, match='has cifar10 by another protocol, weights "weights" where this measurement has "o'
  ):
    measure(monkeypatch, tmp_path, out)
  assert out.read_bytes() == before and len(measured) == 3


def test_a_task_that_the_run_was_not_trained_for_is_refused(monkeypatch):
  """The task is refused at once, and not after the hours that FID takes."""
  use_flags(monkeypatch, data="x", split="val", tasks=["fid", "zero_shot"])
  message = "x/val, whose task zero_shot measures discrimination or .*; the run's objectives are generation: leave it"
  with pytest.raises(UserError, match=message):
    evaluate.read_sections(run_of("generation"))
  sections = evaluate.read_sections(run_of("generation", "discrimination"))
  assert [section.task for section in sections] == ["fid", "zero_shot"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"suite": "zero_shot"}, "unknown suite 'zero_shot'; did you mean zero_shot12?"),
    ({"suite": "retrieval"}, "--suite needs --data_root=DIR"),
    (
      {"suite": "retrieval", "data_root": "."},
      "no data set of retrieval in --data_root=.; its folders were looked for",
    ),
    ({"suite": "retrieval", "data_root": "nowhere"}, "no folder --data_root=nowhere"),
    ({"suite": "zero_shot12", "data_root": ".", "templates": "F.json"}, "--templates has no effect on a suite"),
    ({"suite": "zero_shot12", "data_root": ".", "out": "F.md"}, "F.md should end in .json"),
    ({"suite": "zero_shot12", "data_root": ".", "data": "x"}, "--data has no effect on a suite"),
    ({"data_root": "."}, "belong to --suite"),
  ],
)
def test_wrong_flags_are_refused(monkeypatch, tmp_path, flags, message):
  monkeypatch.chdir(tmp_path)
  use_flags(monkeypatch, **{"out": "F.json", **flags})
  with pytest.raises(UserError, match=message) as error:
    evaluate.read_sections(run_of("discrimination"))
  assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]
