"""Compare the operations counted from a trace with arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from configs import clip_cc3m, diffdis_cc3m
from diffdis_jax.config import Run
from diffdis_jax.preflight import flops
from diffdis_jax.training.step import Trainer, abstract_batch
from tests import steps
from tests.steps import build_trainer


def count(f, *shapes) -> float:
  return flops.count(jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in shapes)))


def convolve(x, kernel, stride=1):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_products_and_convolutions():
  assert count(jnp.dot, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
  assert count(lambda a, b: jnp.einsum("bnd,bmd->bnm", a, b), (2, 3, 8), (2, 5, 8)) == 2 * 2 * 3 * 5 * 8
  forward = 2 * (2 * 6 * 6 * 5) * (3 * 3 * 4)
  assert count(convolve, (2, 6, 6, 4), (3, 3, 4, 5)) == forward
  strided = lambda x, kernel: convolve(x, kernel, stride=2)
  assert count(strided, (2, 6, 6, 4), (3, 3, 4, 5)) == forward / 4


@pytest.mark.parametrize("stride", [1, 2])
def test_a_gradient_costs_twice_its_function(stride):
  total = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, stride)))
  forward = count(total, (2, 8, 8, 4), (3, 3, 4, 5))
  assert count(jax.grad(total, argnums=(0, 1)), (2, 8, 8, 4), (3, 3, 4, 5)) == pytest.approx(3 * forward)


def test_turns_of_loops_and_branches():
  product = 2 * 4 * 4 * 4
  loop = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]
  assert count(loop, (4, 4)) == 7 * product
  assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), (4, 4)) == 2 * product
  assert count(jax.checkpoint(lambda x: x @ x), (4, 4)) == product


def multiply_adds(*objectives: str) -> float:
  """Return the multiply-adds, in billions, of a training step of the paper's network for one sample."""
  config = diffdis_cc3m.get_config("latents=none")
  config.objectives, config.batch_size, config.model.remat = objectives, 2, "none"
  program = flops.trace_train(Trainer(Run.of(config), steps.make_mesh()))
  return program.operations / 2 / config.batch_size / 1e9


@pytest.mark.full
def test_the_papers_network_costs_what_arithmetic_says():
  """Count multiply-adds of one sample, in billions: UNet 90.1; text tower 6.65, forward only, with the null prompt's
  for every second sample; down path and middle 28.6, alignment 0.74, fusion 0.11."""
  text = 6.65 * 1.5
  generation = multiply_adds("generation")
  assert generation == pytest.approx(3 * 90.1 + text, rel=0.01)
  joint = multiply_adds("generation", "discrimination")
  assert joint - generation == pytest.approx(3 * (28.6 + 0.74 + 0.11), rel=0.02)


@pytest.mark.full
@pytest.mark.parametrize(
  "name, config, expected",
  [
    ("joint", diffdis_cc3m.get_config("latents=none"), 29.45 / (3 * (90.1 + 29.45))),
    ("vit_b32", clip_cc3m.get_config("model=vit_b32"), 1 / 3),
    ("vit_l14", clip_cc3m.get_config("model=vit_l14"), 1 / 3),
  ],
)
def test_the_cost_of_one_contrastive_batch_in_four_microbatches(name, config, expected):
  """Its first pass runs discrimination, or both towers, forward; preflight does not count this pass."""
  mesh, counts, counted = steps.make_mesh(), [], set()
  config.batch_size = 64
  config.model.update(remat="none", attention_kernel="xla")
  for config.optim.accumulate in (1, 4):
    step = build_trainer(config, mesh)
    batch = abstract_batch(step.run, step.network, mesh)
    counts.append(flops.count(step.train_step.trace(step.abstract_state, batch).jaxpr))
    counted.add(flops.trace_train(Trainer(step.run, mesh)).operations)
  assert counts[1] / counts[0] - 1 == pytest.approx(expected, rel=0.1), name
  assert counted == {counts[0]}
