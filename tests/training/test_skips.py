"""A step that is skipped changes nothing, and one that is not is the same, bit for bit, as without the check."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from diffdis_jax.config.sections import Optim
from diffdis_jax.structs import LatentBatch
from diffdis_jax.training import skips
from diffdis_jax.training.step import take_step
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
  program = trainer.train_step.lower(*trainer.abstract_state.split(), batches[0]).compile()
  return trainer.with_params(params), program, batches


def bits(state):
  """Of all that a step may change, except its number."""
  trees = state.params, state.ema, state.opt_state, state.norms
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(trees)}


def with_norms(state, **values):
  place = lambda name, value: jax.device_put(np.float32(value), state.norms[name].sharding)
  return state.replace(norms={**state.norms, **{name: place(name, value) for name, value in values.items()}})


CASES = {
  "plain": ({}, (1, 1, 1)),
  "GradCache": ({"optim.accumulate": 2}, (1, 1, 1)),
  "microbatches over a mesh": ({"optim.accumulate": 2, "optim.contrastive_batch": "microbatch"}, (2, 2, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_changes_nothing(monkeypatch, case):
  monkeypatch.setattr(skips, "SETTLED", 2.0)
  changes, mesh = CASES[case]
  config = steps.make_config(**CHANGES, **changes, **{"optim.skip_deviations": 8.0})
  state, program, (first, second, not_finite) = compiled(config, steps.make_mesh(*mesh))
  for batch in (first, second):
    state, metrics = take_step(program, state, batch)
    assert metrics["skipped"].count == 0 and metrics["loss"].count > 0
  mean = float(state.norms["mean"])
  for i, batch in enumerate((not_finite, second)):
    if i == 1:  # as if the norms before had been a hundredth of this batch's
      state = with_norms(state, mean=mean / 100, variance=0.0)
    before = bits(state)
    state, metrics = take_step(program, state, batch)
    assert bits(state) == before and int(state.step) == 3 + i
    assert metrics["skipped"].count == 1
    assert all(x == 0 for name, each in metrics.items() if name != "skipped" for x in jax.tree.leaves(each))
    seen = float(metrics["skipped"].total)
    assert np.isnan(seen) if i == 0 else 0 < seen < np.inf
  state, metrics = take_step(program, with_norms(state, mean=mean), second)
  assert bits(state) != before and metrics["skipped"].count == 0 and float(state.norms["count"]) == 3


def test_good_steps_are_the_same_bits_without_the_check(monkeypatch):
  monkeypatch.setattr(skips, "SETTLED", 2.0)  # so that the last program is the plain one above, and is compiled once
  ends = []
  for changes in ({"optim.skip_bad_steps": 0}, {}, {"optim.skip_deviations": 8.0}):
    config = steps.make_config(**CHANGES, **changes)
    state, program, (first, second, *_) = compiled(config, steps.make_mesh())
    found = []
    for batch in (first, second, first):
      state, metrics = take_step(program, state, batch)
      metrics.pop("skipped", None)
      found += [np.asarray(x).tobytes() for x in jax.tree.leaves(metrics)]
    ends.append((bits(state.replace(norms={})), found))
  assert ends[0] == ends[1] == ends[2]


def test_a_step_far_above_the_rolling_mean_is_bad():
  section = Optim(skip_deviations=5.0)
  norms, rng = skips.no_norms(section), np.random.default_rng(0)
  values = rng.normal(10.0, 2.0, 200).astype(np.float32)
  for value in values:
    judged = skips.judge(jnp.float32(0), jnp.asarray(value), norms, section)
    assert judged.good
    norms = judged.norms
  assert abs(float(norms["mean"]) - 10) < 0.5 and abs(float(norms["variance"]) ** 0.5 - 2) < 0.4
  at = lambda norm, loss=0.0: bool(skips.judge(jnp.float32(loss), jnp.float32(norm), norms, section).good)
  assert at(18.0) and at(0.0) and not at(25.0) and not at(np.inf) and not at(np.nan) and not at(10.0, loss=np.nan)
  # The first hundred are a plain mean.
  norms = skips.no_norms(section)
  for value in values[:50]:
    norms = skips.judge(jnp.float32(0), jnp.asarray(value), norms, section).norms
  np.testing.assert_allclose([norms["mean"], norms["variance"]], [values[:50].mean(), values[:50].var()], rtol=1e-4)


def test_of_norms_that_hardly_vary_a_tenth_of_the_mean_is_a_deviation():
  section = Optim(skip_deviations=5.0)
  norms = {name: jnp.float32(value) for name, value in (("count", 50), ("mean", 10), ("variance", 0))}
  at = lambda norm: bool(skips.judge(jnp.float32(0), jnp.float32(norm), norms, section).good)
  assert at(14.9) and not at(15.1)


@pytest.mark.parametrize("count, is_good", [(0, True), (19, True), (20, False)])
def test_nothing_is_far_before_twenty_steps(count, is_good):
  norms = {name: jnp.float32(value) for name, value in (("count", count), ("mean", 10), ("variance", 0))}
  section = Optim(skip_deviations=5.0)
  assert skips.judge(jnp.float32(0), jnp.float32(1e6), norms, section).good == is_good


def test_without_a_limit_nothing_is_kept():
  assert skips.no_norms(Optim()) == skips.no_norms(Optim(skip_bad_steps=0, skip_deviations=3.0)) == {}


def taken(counts):
  return [{"skipped": skips.Average(total=np.float32(np.nan), count=np.float32(count))} for count in counts]


def test_steps_are_counted_in_a_window_and_named(caplog):
  section = Optim(skip_bad_steps=1, skip_window=4)
  found = skips.SkippedSteps(section, {})
  for step, metrics in enumerate(taken([0, 1, 0, 0, 0, 1]), start=1):
    assert found.take(step, metrics, np.asarray(["a", f"b{step}"])) == {}
  assert not caplog.records
  assert found.to_meta() == {"recent": [2, 6], "new": 2}
  assert [record.getMessage() for record in caplog.records] == [
    f"step {step} is skipped: its gradient norm is nan; its rows: a, b{step}" for step in (2, 6)
  ]
  assert not found.is_beyond(6) and found.recent == [6]
  resumed = skips.SkippedSteps(section, found.to_meta())
  assert resumed.report() == {"skipped": 2} and resumed.report() == {}
  resumed.take(7, taken([1])[0], np.asarray(["c"]))
  assert resumed.is_beyond(7)
  said = "2 of the last 4 steps were skipped by step 7, from step 6 on; more than optim.skip_bad_steps=1; "
  assert str(resumed.too_many(7, 4)).startswith(said)


def test_a_run_that_resumes_to_skip_none_is_not_held_to_those_before():
  found = skips.SkippedSteps(Optim(skip_bad_steps=0), {"recent": [2, 6], "new": 1})
  assert not found.is_beyond(8) and found.report() == {"skipped": 1}
