"""Compare the numerics of norms and of the time embedding with numpy in float64."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffdis_jax.models import layers
from tests.models import networks


def test_timestep_embedding_is_cosine_then_sine():
  t = np.array([0, 1, 999, 1000], np.int32)
  angles = t[:, None] / 10000.0 ** (np.arange(8) / 8)
  expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
  np.testing.assert_allclose(layers.sinusoidal(jnp.asarray(t), 16), expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_norms_of_bfloat16_are_computed_in_float32(norm):
  rng = np.random.default_rng(0)
  x = jnp.asarray(100 + rng.standard_normal((2, 4, 4, 8)), jnp.bfloat16)
  if norm == "group":
    module = layers.GroupNorm(8, groups=2, eps=1e-5, rngs=nnx.Rngs(0))
    grouped, axes = np.asarray(x, np.float64).reshape(2, 4, 4, 2, 4), (1, 2, 4)
  else:
    module, x = layers.LayerNorm(8, rngs=nnx.Rngs(0)), x.reshape(2, 16, 8)
    grouped, axes = np.asarray(x, np.float64), (-1,)
  expected = (grouped - grouped.mean(axes, keepdims=True)) / np.sqrt(grouped.var(axes, keepdims=True) + 1e-5)
  normed = module(x)
  assert normed.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(normed, np.float64), expected.reshape(x.shape), atol=2e-2)


def test_group_norm_and_its_gradients_equal_flax():
  rng = np.random.default_rng(0)
  # The means are not zero, so the factor and the offset of each channel must cancel them.
  x = jnp.asarray(rng.normal(rng.uniform(-20, 20, 8), 1.0, (2, 4, 4, 8)), jnp.float32)
  weights = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
  ours = layers.GroupNorm(8, groups=4, eps=1e-5, rngs=nnx.Rngs(0))
  for parameter in (ours.norm.scale, ours.norm.bias):
    parameter[...] = jnp.asarray(rng.standard_normal(8), jnp.float32)
  total = lambda module, x: jnp.sum(weights * jnp.sin(module(x)))
  ours_gradients, expected = (nnx.grad(total, argnums=(0, 1))(module, x) for module in (ours, ours.norm))
  # Compile as a run does: the tests' faster compiler settings round these sums more coarsely.
  options = {"xla_backend_optimization_level": 3}
  if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    options["xla_cpu_use_fusion_emitters"] = True
  as_in_runs = functools.partial(jax.jit, compiler_options=options)
  outputs = (as_in_runs(lambda x, module=module: module(x))(x) for module in (ours, ours.norm))
  assert networks.relative_error(*outputs) < 1e-5
  assert networks.relative_error(ours_gradients[1], expected[1]) < 1e-4
  for name in ("scale", "bias"):
    assert networks.relative_error(getattr(ours_gradients[0].norm, name)[...], getattr(expected[0], name)[...]) < 1e-4


@pytest.mark.parametrize(
  "side, size, stride, padding, as_product",
  [
    (2, 3, 1, ((1, 1), (1, 1)), True),
    (5, 3, 1, ((1, 1), (1, 1)), True),
    (5, 3, 2, ((1, 1), (1, 1)), True),
    (6, 3, 2, ((0, 1), (0, 1)), True),
    (6, 2, 1, ((2, 0), (0, 1)), True),
    (16, 1, 1, ((0, 0), (0, 0)), True),
    (16, 2, 2, ((0, 0), (0, 0)), True),
    (16, 3, 1, ((1, 1), (1, 1)), False),
  ],
)
def test_convolutions_of_few_positions_or_whole_patches_are_products(side, size, stride, padding, as_product):
  """Their values, and the gradients of images and kernel, equal a convolution's."""
  rng = np.random.default_rng(0)
  x, kernel = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, side, side, 3), (size, size, 3, 120))
  )
  settings = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))

  def run(convolve, x, kernel):
    return jnp.sin(convolve(x, kernel, (stride, stride), padding, **settings))

  def with_gradients(convolve):
    y, pull = jax.vjp(functools.partial(run, convolve), x, kernel)
    return y, *pull(jnp.cos(y))

  pairs = zip(*(jax.jit(with_gradients, static_argnums=0)(f) for f in (layers.convolve, jax.lax.conv_general_dilated)))
  for ours, theirs in pairs:
    assert networks.relative_error(ours, theirs) < 1e-5
  text = jax.jit(functools.partial(run, layers.convolve)).lower(x, kernel).as_text()
  assert ("convolution" not in text) == as_product
