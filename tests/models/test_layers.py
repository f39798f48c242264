"""Attention on both of its CPU paths, and the numerics policy, against numpy in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffdis_jax.models import layers
from tests.models import networks


def softmax_attention(q, k, v, mask=None):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
  if mask is not None:
    scores = np.where(mask, scores, -np.inf)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(axis=-1, keepdims=True), v)


def qkv(n: int, m: int, dtype=jnp.float32):
  rng = np.random.default_rng(n)
  return tuple(jnp.asarray(2 * rng.standard_normal((2, size, 3, 8)), dtype) for size in (n, m, m))


# 128 x 128 scores are where attention on a CPU begins to go head by head.
@pytest.mark.parametrize("n, m", [(5, 7), (127, 128), (128, 128), (256, 64), (16384, 1)])
def test_attention_equals_softmax(n, m):
  q, k, v = qkv(n, m)
  assert networks.relative_error(jax.jit(layers.attend)(q, k, v), softmax_attention(q, k, v)) < 1e-5


@pytest.mark.parametrize("n", [6, 128])
def test_masked_attention_equals_softmax(n):
  q, k, v = qkv(n, n)
  mask = np.tril(np.ones((n, n), bool))
  attended = jax.jit(layers.attend)(q, k, v, mask=mask)
  assert networks.relative_error(attended, softmax_attention(q, k, v, mask)) < 1e-5


@pytest.mark.parametrize("n", [6, 128])
def test_attention_in_bfloat16_has_its_softmax_in_float32(n):
  q, k, v = qkv(n, n, jnp.bfloat16)
  attended = layers.attend(q, k, v)
  assert attended.dtype == jnp.bfloat16
  # bf16 keeps 8 bits: rounding of probabilities and outputs, not of scores, whose error would be some e-1.
  assert networks.relative_error(attended.astype(jnp.float32), softmax_attention(q, k, v)) < 1e-2


@pytest.mark.parametrize("n", [6, 128])
def test_one_more_key_is_merged_exactly(n):
  q, k, v = qkv(n, n + 1)
  merged = jax.jit(lambda q, k, v: layers.with_one_more(*layers.attend_with_lse(q, k, v), q, *one))
  k, v, one = k[:, 1:], v[:, 1:], (k[:, :1], v[:, :1])
  expected = softmax_attention(q, *(np.concatenate(pair, axis=1) for pair in zip(one, (k, v))))
  assert networks.relative_error(merged(q, k, v), expected) < 1e-5


def test_pairs_keep_the_rows_of_each_part_together():
  first, second = jnp.arange(12).reshape(6, 2), 100 + jnp.arange(12).reshape(6, 2)
  both = layers.pair(first, second, 3)
  assert both[:, 0].tolist() == [0, 2, 100, 102, 4, 6, 104, 106, 8, 10, 108, 110]
  for found, expected in zip(layers.unpair(both, 3), (first, second), strict=True):
    np.testing.assert_array_equal(found, expected)


def test_both_paths_have_the_same_gradient():
  q, k, v = qkv(9, 9)
  mask = jnp.asarray(np.tril(np.ones((9, 9), bool)))
  # Its private name, since a public call of this size takes the other path.
  paths = (layers.attend_with_lse, layers._attend_by_head)
  total = lambda f, qkv: sum(jnp.sum(jnp.sin(x)) for x in f(*qkv, mask=mask))
  one, other = (jax.jit(jax.grad(functools.partial(total, f)))((q, k, v)) for f in paths)
  for a, b in zip(one, other, strict=True):
    assert networks.relative_error(a, b) < 1e-5


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
  # Means unlike zero, which the factor and the term a channel must cancel.
  x = jnp.asarray(rng.normal(rng.uniform(-20, 20, 8), 1.0, (2, 4, 4, 8)), jnp.float32)
  weights = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
  ours = layers.GroupNorm(8, groups=4, eps=1e-5, rngs=nnx.Rngs(0))
  for parameter in (ours.norm.scale, ours.norm.bias):
    parameter[...] = jnp.asarray(rng.standard_normal(8), jnp.float32)
  total = lambda module, x: jnp.sum(weights * jnp.sin(module(x)))
  found, expected = (nnx.grad(total, argnums=(0, 1))(module, x) for module in (ours, ours.norm))
  assert networks.relative_error(ours(x), ours.norm(x)) < 1e-5
  assert networks.relative_error(found[1], expected[1]) < 1e-4
  for name in ("scale", "bias"):
    assert networks.relative_error(getattr(found[0].norm, name)[...], getattr(expected[0], name)[...]) < 1e-4
