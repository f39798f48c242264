"""A step that is not finite changes nothing but the number of steps."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from diffdis_jax.structs import LatentBatch
from tests import steps
from tests.models.networks import random_params

# Of few parts: the compiler's time is what these tests cost.
CHANGES = {
  "optim.groups": ((r"^unet\.(middle|norm_out|conv_out)|^alignment|^logit_scale", "new"), (".*", "frozen")),
  "optim.warmup_steps": 0,
}


def make_batches(config, network):
  """Two good batches of latents, and one with a NaN in one row."""
  made = []
  for seed in range(2):
    rng, tokens = np.random.default_rng(seed), steps.make_batch(config, seed).tokens
    latents = rng.normal(size=(config.batch_size, *network.latent_shape)).astype(ml_dtypes.bfloat16)
    made.append(LatentBatch(mean=latents, log_variance=np.full_like(latents, -9), tokens=tokens))
  mean = made[0].mean.copy()
  mean[3, 0, 0, 0] = np.nan
  return [*made, made[0].replace(mean=mean)]


def compiled(config, mesh):
  trainer = steps.build_trainer(config, mesh)
  place = lambda batch: LatentBatch(**steps.sharding.to_global(vars(batch), mesh))
  batches = [place(batch) for batch in make_batches(config, trainer.network)]
  params = jax.device_put(random_params(trainer.shapes, seed=0), trainer.param_shardings)
  program = trainer.train_step.lower(trainer.abstract_state, batches[0]).compile()
  return trainer.with_params(params), program, batches


def bits(state):
  """Of all that a step may change, except its number."""
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
  state, program, (first, second, not_finite) = compiled(
    steps.make_config(**CHANGES, **changes), steps.make_mesh(*mesh)
  )
  for batch in (first, second):
    state, metrics = program(state, batch)
    assert metrics["skipped"].total == 0 and metrics["loss"].count > 0
  for i in range(2):
    before = bits(state)
    state, metrics = program(state, not_finite)
    assert bits(state) == before and int(state.step) == 3 + i and int(state.skipped) == 1 + i
    assert metrics["skipped"].total == metrics["skipped"].count == 1
    assert all(x == 0 for name, each in metrics.items() if name != "skipped" for x in jax.tree.leaves(each))
  state, metrics = program(state, second)
  assert bits(state) != before and metrics["skipped"].total == 0 and int(state.skipped) == 0


@pytest.mark.slow
def test_a_step_that_is_left_out_does_not_delay_the_schedule():
  """A linear schedule of three steps has rate 0 from then on, whichever of them were left out."""
  changes = {"optim.schedule_kind": "linear", "num_steps": 3}
  state, program, (first, second, not_finite) = compiled(steps.make_config(**CHANGES, **changes), steps.make_mesh())
  for batch in (first, not_finite, not_finite):
    state, _ = program(state, batch)
  before = {path: np.asarray(x).tobytes() for path, x in state.params.items()}
  state, metrics = program(state, second)
  assert metrics["grad_norm"].total > 0
  assert {path: np.asarray(x).tobytes() for path, x in state.params.items()} == before
