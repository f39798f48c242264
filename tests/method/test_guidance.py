"""Compare guidance with its equation, and count its calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.method.guidance import guide

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)
T = jnp.asarray([1, 2, 3, 4], jnp.int32)
CONDITION = {"c": jnp.asarray(RNG.standard_normal((4, 2, 3)), jnp.float32), "z": jnp.arange(4, dtype=jnp.float32)}
NULL = jax.tree.map(jnp.zeros_like, CONDITION)


def _denoise(x, t, condition):
  shift = condition["c"].sum(axis=1) + condition["z"][:, None]
  return jnp.sin(x + shift) * t[:, None].astype(jnp.float32)


def _want(scale):
  unconditional, conditional = np.float64(_denoise(X, T, NULL)), np.float64(_denoise(X, T, CONDITION))
  return unconditional + scale * (conditional - unconditional)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_equals_its_equation(scale):
  got = guide(_denoise, X, T, condition=CONDITION, null=NULL, scale=scale)
  np.testing.assert_allclose(got, _want(scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale, sizes", [(1.0, [4]), (2.0, [8])])
def test_one_call_of_twice_the_batch_and_none_of_it_at_scale_one(scale, sizes):
  batch_sizes = []

  def denoise(x, t, condition):
    batch_sizes.append(len(x))
    assert len(t) == len(condition["c"]) == len(condition["z"]) == len(x)
    return _denoise(x, t, condition)

  assert guide(denoise, X, T, condition=CONDITION, null=NULL, scale=scale).shape == X.shape
  assert batch_sizes == sizes
