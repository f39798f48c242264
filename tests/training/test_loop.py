from __future__ import annotations

import json

import pytest

from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.run import checkpoint, provenance, workdir
from diffdis_jax.training import evaluator, loop
from diffdis_jax.training.step import Trainer
from tests import tiny


class FakeEvaluator(evaluator.Evaluator):
  """An evaluator that is due after every fourth step, records the steps, and may fail."""

  def __init__(self, failing: type[UserError] | None):
    self.failing, self.evaluated_steps = failing, []

  def is_due(self, step, *, last):
    return step % 4 == 0

  def after_step(self, step, state, writer, *, last):
    self.evaluated_steps.append(step)
    writer.scalars(step, {"test/acc1": 0.5})
    if self.failing:
      raise self.failing("checkpoint.best_metric=test/acc_1 is none of test/acc1")
    return {}


@pytest.mark.slow
def test_an_evaluation_that_fails_loses_no_step_and_is_repeated(tmp_path, monkeypatch):
  config = tiny.get_config("autoencoder")
  config.update(num_steps=6, save_every=3, log_every=3)
  run = Run.of(config)
  trainer = Trainer(run, sharding.make_mesh(**vars(run.mesh)))  # compile once for all the runs
  train = lambda: loop.train_and_evaluate(run, str(tmp_path), trainer=trainer)
  failing, passing = FakeEvaluator(failing=UserError), FakeEvaluator(failing=None)
  monkeypatch.setattr(evaluator, "Evaluator", lambda *_: failing)
  for _ in range(2):  # the second time, the run is finished before its first step
    with pytest.raises(UserError, match="best_metric=test/acc_1 is none of test/acc1"):
      train()
  assert workdir.latest_step(tmp_path) == 4 and failing.evaluated_steps == [4, 4]

  monkeypatch.setattr(evaluator, "Evaluator", lambda *_: passing)
  train()
  assert passing.evaluated_steps == [4] and workdir.latest_step(tmp_path) == 6
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [(line["step"], "loss" in line) for line in lines] == [(3, True), (4, False), (6, True)]

  def refuse(_):
    raise UserError("no space left")

  monkeypatch.setattr(checkpoint.Checkpointer, "wait", refuse)  # the last save fails after the last step
  with pytest.raises(UserError, match="no space left"):
    train()
  assert [line["why"] for line in provenance.read(tmp_path) if line["event"] == "end"][-2:] == ["finished", "failed"]
