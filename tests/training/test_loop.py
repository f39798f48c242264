from __future__ import annotations

import json

import jax
import pytest

from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.run import checkpoint, provenance, workdir
from diffdis_jax.training import evaluator, loop
from diffdis_jax.training.step import Trainer
from tests import steps, tiny


@pytest.mark.parametrize(
  "batch_size, accumulate, of_a_call, rows",
  [(48, 1, 64, 64), (48, 4, 64, 12), (1024, 1, 512, 512), (256, 1, 512, 256), (1024, 4, 512, 256)],
)
def test_evaluations_take_no_more_rows_than_a_step(monkeypatch, batch_size, accumulate, of_a_call, rows):
  run = Run.of(steps.make_config(batch_size=batch_size, **{"optim.accumulate": accumulate}))
  monkeypatch.setattr(evaluator.batches, "rows_of_a_call", lambda mesh: of_a_call)
  assert evaluator.rows_at_a_time(run, steps.make_mesh()) == rows


class FakeEvaluator(evaluator.Evaluator):
  """Due after every fourth step; says where it was asked, and fails where it is told to."""

  def __init__(self, failing: type[UserError] | None):
    self.failing, self.asked = failing, []

  def is_due(self, step, *, last):
    return step % 4 == 0

  def after_step(self, step, state, writer, *, last):
    self.asked.append(step)
    writer.scalars(step, {"test/acc1": 0.5})
    if self.failing:
      raise self.failing("checkpoint.best_metric=test/acc_1 is none of test/acc1")
    return {}


def prepare(config):
  """Its trainer, which compiles once for all the runs of a test."""
  run = Run.of(config)
  return Trainer(run, sharding.make_mesh(**vars(run.mesh)))


@pytest.mark.slow
def test_an_evaluation_that_fails_costs_no_step_and_is_done_again(tmp_path, monkeypatch):
  config = tiny.get_config("autoencoder")
  config.update(num_steps=6, save_every=3, log_every=3)
  trainer = prepare(config)
  train = lambda: loop.train_and_evaluate(Run.of(config), str(tmp_path), trainer=trainer)
  failing, passing = FakeEvaluator(failing=UserError), FakeEvaluator(failing=None)
  monkeypatch.setattr(evaluator, "Evaluator", lambda *_: failing)
  for _ in range(2):  # the second time it is done before the first step
    with pytest.raises(UserError, match="best_metric=test/acc_1 is none of test/acc1"):
      train()
  assert workdir.latest_step(tmp_path) == 4 and failing.asked == [4, 4]

  monkeypatch.setattr(evaluator, "Evaluator", lambda *_: passing)
  train()
  assert passing.asked == [4] and workdir.latest_step(tmp_path) == 6
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [(line["step"], "loss" in line) for line in lines] == [(3, True), (4, False), (6, True)]

  def refuse(_):
    raise UserError("no space left")

  monkeypatch.setattr(checkpoint.Checkpointer, "wait", refuse)  # as where the last save, behind the last step, fails
  with pytest.raises(UserError, match="no space left"):
    train()
  assert [line["why"] for line in provenance.read(tmp_path) if line["event"] == "end"][-2:] == ["finished", "failed"]


class TwoProcesses:
  """jax, of so many processes."""

  def __getattr__(self, name):
    return (lambda: 2) if name == "process_count" else getattr(jax, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind, saved", [(evaluator.UnknownMetric, 4), (UserError, 3)])
def test_several_processes_save_what_all_of_them_refuse_alike(tmp_path, monkeypatch, kind, saved):
  """Of a damaged record only those know that have read it, while the others wait for them."""
  config = tiny.get_config("autoencoder")
  config.update(num_steps=6, save_every=3, log_every=3)
  monkeypatch.setattr(evaluator, "Evaluator", lambda *_: FakeEvaluator(failing=kind))
  monkeypatch.setattr("diffdis_jax.training.loop.jax", TwoProcesses())
  with pytest.raises(kind, match="best_metric=test/acc_1 is none of test/acc1"):
    loop.train_and_evaluate(Run.of(config), str(tmp_path))
  assert workdir.latest_step(tmp_path) == saved
