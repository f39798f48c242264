"""Test that a step with a non-finite loss or gradient changes only the number of steps."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from diffdis_jax.structs import LatentBatch
from tests import steps

# Only a few parts are trained: most of the time of these tests is compilation.
CHANGES = {
  "optim.groups": ((r"^unet\.(middle|norm_out|conv_out)|^alignment|^logit_scale", "new"), (".*", "frozen")),
  "optim.warmup_steps": 0,
}


def make_batches(config):
  """Make two good batches of latents, and a third with a NaN in one row."""
  batches, shape = [], steps.network_of(config).latent_shape
  for seed in range(2):
    rng, tokens = np.random.default_rng(seed), steps.make_batch(config, seed).tokens
    latents = rng.normal(size=(config.batch_size, *shape)).astype(ml_dtypes.bfloat16)
    batches.append(LatentBatch(mean=latents, log_variance=np.full_like(latents, -9), tokens=tokens))
  mean = batches[0].mean.copy()
  mean[3, 0, 0, 0] = np.nan
  return [*batches, batches[0].replace(mean=mean)]


def bits(state):
  """Return the bits of all arrays that a step may change, except the number of steps."""
  trees = state.params, state.ema, state.opt_state
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(trees)}


CASES = {
  "plain": ({}, (1, 1, 1)),
  "GradCache": ({"optim.accumulate": 2}, (1, 1, 1)),
  "microbatches over a mesh": ({"optim.accumulate": 2, "optim.contrastive_batch": "microbatch"}, (2, 2, 1)),
}


@pytest.mark.parametrize(
  "case", ["plain", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "plain")]
)
def test_a_step_that_is_not_finite_changes_nothing(case):
  changes, mesh = CASES[case]
  config = steps.make_config(**CHANGES, **changes)
  first, second, not_finite = make_batches(config)
  trainer = steps.Trainer(config, steps.make_mesh(*mesh), first)
  state, metrics = trainer.run(trainer.initial(), first, second)
  assert all(metrics_of_step["skipped"].total == 0 and metrics_of_step["loss"].count > 0 for metrics_of_step in metrics)
  before = bits(state)
  for i in range(2):
    state, (metrics,) = trainer.run(state, not_finite)
    assert bits(state) == before and int(state.step) == 3 + i and int(state.skipped) == 1 + i
    assert metrics["skipped"].total == metrics["skipped"].count == 1
    assert all(x == 0 for name, metric in metrics.items() if name != "skipped" for x in jax.tree.leaves(metric))
  state, (metrics,) = trainer.run(state, second)
  assert bits(state) != before and metrics["skipped"].total == 0 and int(state.skipped) == 0


@pytest.mark.slow
def test_a_skipped_step_does_not_delay_the_schedule():
  """A linear schedule of three steps has rate 0 after them, even if some of the steps were skipped."""
  changes = {"optim.schedule_kind": "linear", "num_steps": 3}
  config = steps.make_config(**CHANGES, **changes)
  first, second, not_finite = make_batches(config)
  trainer = steps.Trainer(config, batch=first)
  before, _ = trainer.run(trainer.initial(), first, not_finite, not_finite)
  after, (metrics,) = trainer.run(before, second)
  assert metrics["grad_norm"].total > 0
  assert bits(after.replace(opt_state=(), ema={})) == bits(before.replace(opt_state=(), ema={}))
