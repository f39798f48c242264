"""Guidance against its equation, and what it costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
def test_equation(scale):
  got = guide(_denoise, X, T, condition=CONDITION, null=NULL, scale=scale).guided
  np.testing.assert_allclose(got, _want(scale), rtol=1e-5, atol=1e-5)


def test_a_scale_that_is_an_argument_of_the_program():
  """Both branches then, whatever its value; at a constant 1 there is one."""
  of_scale = jax.jit(lambda scale: guide(_denoise, X, T, condition=CONDITION, null=NULL, scale=scale))
  for scale in (0.0, 1.0, 7.5):
    found = of_scale(np.float32(scale))
    np.testing.assert_allclose(found.guided, _want(scale), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.unconditional, _want(0.0), rtol=1e-5, atol=1e-5)
  assert guide(_denoise, X, T, condition=CONDITION, null=NULL, scale=1).unconditional is None


def test_null_broadcasts_over_the_batch():
  null = {"c": jnp.zeros((1, 2, 3)), "z": jnp.zeros(())}
  got = guide(_denoise, X, T, condition=CONDITION, null=null, scale=3.0).guided
  np.testing.assert_allclose(got, _want(3.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale, sizes", [(1.0, [4]), (2.0, [8])])
def test_one_call_of_twice_the_batch_and_none_of_it_at_scale_one(scale, sizes):
  seen = []

  def denoise(x, t, condition):
    seen.append(len(x))
    assert len(t) == len(condition["c"]) == len(condition["z"]) == len(x)
    return _denoise(x, t, condition)

  assert guide(denoise, X, T, condition=CONDITION, null=NULL, scale=scale).guided.shape == X.shape
  assert seen == sizes


def test_doubling_a_sharded_batch_moves_nothing():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  rows = NamedSharding(mesh, PartitionSpec("data"))
  run = jax.jit(
    lambda x, t, condition: guide(_denoise, x, t, condition=condition, null=NULL, scale=2.0).guided,
    in_shardings=rows,
    out_shardings=rows,
  )
  program = run.lower(X, T, CONDITION).compile().as_text()
  assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
  np.testing.assert_allclose(run(X, T, CONDITION), _want(2.0), rtol=1e-5, atol=1e-5)
