"""Runs in which batches are bad: they leave those steps out, or end, and are the same however they are interrupted."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.config import Run
from diffdis_jax.errors import Diverged
from diffdis_jax.parallel import sharding
from diffdis_jax.run import provenance, workdir
from diffdis_jax.training import loop, step
from diffdis_jax.training.step import Trainer
from tests import steps, tiny
from tests.test_resume import metrics, restore_training

pytestmark = pytest.mark.slow


def make_config(**changes):
  config = tiny.get_config("autoencoder")
  config.update(num_steps=8, save_every=4, log_every=2, eval_every=8, sample_every=8)
  config.optim.warmup_steps = 0
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture
def spoil(monkeypatch):
  """Makes the loss of these batches, by their number from 0, NaN within the compiled step."""

  def of(config, numbers):
    batches = steps.open_batches(config)
    pixels = [int(next(batches)["image"].sum()) for _ in range(max(numbers) + 1)]
    original = step.loss_of

    def loss_of(*args):
      def loss(trainable, batch, *rest):
        total, (found, statistics) = original(*args)(trainable, batch, *rest)
        is_bad = jnp.isin(jnp.sum(batch.image.astype(jnp.int32)), jnp.array([pixels[number] for number in numbers]))
        factor = jnp.where(is_bad, jnp.nan, 1.0)
        found["loss"] = found["loss"].replace(total=found["loss"].total * factor)
        return total * factor, (found, statistics)

      return loss

    monkeypatch.setattr(step, "loss_of", loss_of)

  return of


def prepare(config):
  """Return the config's trainer, which compiles once for all the runs of a test. Call it after `spoil`."""
  run = Run.of(config)
  return Trainer(run, sharding.make_mesh(**vars(run.mesh)))


def train(trainer, path):
  loop.train_and_evaluate(trainer.run, str(path), trainer=trainer)


def resume_from(run, copy, *, at, trainer):
  """A copy of the run whose checkpoints after `at` are gone, trained again to its end."""
  shutil.copytree(run, copy)
  for saved in workdir.all_steps(workdir.checkpoints(str(copy))):
    if int(saved.name) > at:
      shutil.rmtree(pathlib.Path(saved))
  train(trainer, copy)


def test_bad_batches_are_left_out_and_a_resumed_run_is_the_same(tmp_path, spoil, caplog):
  config = make_config()
  spoil(config, [2, 4])
  whole, trainer = tmp_path / "whole", prepare(config)
  train(trainer, whole)
  lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
  assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 0]
  assert all(np.isfinite(line["loss"]) for line in lines)
  assert "1 steps up to 4 changed nothing: loss or gradient was not finite" in caplog.text
  resume_from(whole, tmp_path / "resumed", at=4, trainer=trainer)
  assert metrics(tmp_path / "resumed") == metrics(whole)
  (a, a_next), (b, b_next) = restore_training(tmp_path / "resumed"), restore_training(whole)
  np.testing.assert_array_equal(a_next, b_next)
  for x, y in zip(*(step.jax.tree.leaves((s.params, s.ema, s.opt_state)) for s in (a, b)), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_beyond_its_budget_a_run_ends_with_the_code_that_restarts(tmp_path, spoil):
  config = make_config(**{"optim.skip_bad_steps": 1})
  spoil(config, [4, 5])
  said = (
    "^the last 2 steps up to 6 changed nothing, since loss or gradient was not finite; the last checkpoint is 4; lower"
  )
  with pytest.raises(Diverged, match=said) as raised:
    train(prepare(config), tmp_path)
  assert raised.value.code == 1 and workdir.latest_step(str(tmp_path)) == 4
  assert provenance.read(tmp_path)[-1]["why"] == "failed"
