"""Runs in which batches are bad: they end well, or say why they end, and are the same however they are interrupted."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.run import committed
from diffdis_jax.training import loop, plugs, skips, step
from tests import steps, tiny
from tests.test_resume import metrics, restore_training

NAN, LARGE = np.nan, 1e6


def make_config(**changes):
  config = tiny.get_config("autoencoder")
  config.update(num_steps=8, save_every=4, log_every=2, eval_every=8, sample_every=8)
  config.optim.warmup_steps = 0
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture
def spoil(monkeypatch):
  """Multiplies the loss of these batches, by their number from 0, within the compiled step."""

  def of(config, factors):
    batches = steps.open_batches(config)
    pixels = [int(next(batches)["image"].sum()) for _ in range(max(factors) + 1)]
    original = plugs.loss_function

    def loss_function(network, run):
      def loss(trainable, fixed, batch, *rest):
        total, (found, statistics) = original(network, run)(trainable, fixed, batch, *rest)
        factor = jnp.ones(())
        for number, by in factors.items():
          factor = jnp.where(jnp.sum(batch.image.astype(jnp.int32)) == pixels[number], by, factor)
        found["loss"] = found["loss"].replace(total=found["loss"].total * factor)
        return total * factor, (found, statistics)

      return loss

    monkeypatch.setattr(plugs, "loss_function", loss_function)

  return of


def prepare(config):
  """Its programs, once for all the runs of a test. After `spoil`."""
  run = Run.of(config)
  return loop.Prepared.of(run, sharding.make_mesh(**vars(run.mesh)))


def train(prepared, path):
  loop.train_and_evaluate(prepared.trainer.run, str(path), prepared=prepared)


def resume_from(run, copy, *, at, prepared):
  """A copy of the run whose checkpoints after `at` are gone, trained again to its end."""
  shutil.copytree(run, copy)
  for saved in committed.all_steps(committed.folder(str(copy))):
    if int(saved.name) > at:
      shutil.rmtree(pathlib.Path(saved))
  train(prepared, copy)


def assert_same_end(found, expected, restored):
  """`restored`: what restore_training gives of the expected run."""
  assert metrics(found) == metrics(expected)
  (a, a_next), (b, b_next) = restore_training(found), restored
  np.testing.assert_array_equal(a_next, b_next)
  for x, y in zip(*(step.jax.tree.leaves((s.params, s.ema, s.opt_state, s.norms)) for s in (a, b)), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_bad_batch_and_a_spike_are_skipped_and_a_resumed_run_is_the_same(tmp_path, spoil, monkeypatch, caplog):
  monkeypatch.setattr(skips, "SETTLED", 2.0)
  config = make_config(**{"optim.skip_deviations": 8.0})
  spoil(config, {2: NAN, 4: LARGE})
  whole, prepared = tmp_path / "whole", prepare(config)
  train(prepared, whole)
  lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
  assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 0]
  assert all(np.isfinite(line["loss"]) and line["loss"] < 100 for line in lines)
  batches = steps.open_batches(config)
  rows = [next(batches)["rows"] for _ in range(5)]
  said = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
  assert said[0] == f"step 3 is skipped: its gradient norm is nan; its rows: {', '.join(rows[2])}"
  assert said[1].startswith("step 5 is skipped: ") and said[1].endswith(f"its rows: {', '.join(rows[4])}")
  assert len(said) == 2
  resume_from(whole, tmp_path / "resumed", at=4, prepared=prepared)
  assert_same_end(tmp_path / "resumed", whole, restore_training(whole))


def test_a_run_that_only_gets_bad_batches_ends_with_what_it_knows(tmp_path, spoil):
  config = make_config(**{"optim.skip_bad_steps": 1, "optim.skip_window": 4})
  spoil(config, {number: NAN for number in range(4, 12)})
  with pytest.raises(
    UserError,
    match="^2 of the last 4 steps were skipped by step 6, from step 5 on; more than optim.skip_bad_steps=1; the log"
    " names their rows, and the last checkpoint is 4; lower",
  ):
    train(prepare(config), tmp_path / "run")
  assert committed.latest_step(str(tmp_path / "run")) == 4


def test_a_run_that_skips_none_ends_at_a_bad_step(tmp_path, spoil):
  config = make_config(**{"optim.skip_bad_steps": 0})
  spoil(config, {5: NAN})
  with pytest.raises(UserError, match="is not finite by step 6; the last good checkpoint is step 4; lower optim.rates"):
    train(prepare(config), tmp_path)
