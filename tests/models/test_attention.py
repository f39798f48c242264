"""Compare attention's two CPU paths, and attention over [text, image] without concatenation, with numpy in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.models import attention
from diffdis_jax.models.attention import Projected
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


# From 128 x 128 scores on, attention on a CPU goes head by head.
@pytest.mark.parametrize("n, m", [(5, 7), (127, 128), (128, 128), (256, 64), (16384, 1)])
def test_attention_equals_softmax(n, m):
  q, k, v = qkv(n, m)
  assert networks.relative_error(jax.jit(attention.attend)(q, k, v), softmax_attention(q, k, v)) < 1e-5


@pytest.mark.parametrize("n", [6, 128])
def test_masked_attention_equals_softmax(n):
  q, k, v = qkv(n, n)
  mask = np.tril(np.ones((n, n), bool))
  attended = jax.jit(attention.attend)(q, k, v, mask=mask)
  assert networks.relative_error(attended, softmax_attention(q, k, v, mask)) < 1e-5


@pytest.mark.parametrize("n", [6, 128])
def test_one_more_key_is_merged_exactly(n):
  q, k, v = qkv(n, n + 1)
  merged = jax.jit(lambda q, k, v: attention.merge_extra_key(*attention.attend_with_lse(q, k, v), q, *extra))
  k, v, extra = k[:, 1:], v[:, 1:], (k[:, :1], v[:, :1])
  expected = softmax_attention(q, *(np.concatenate(pair, axis=1) for pair in zip(extra, (k, v))))
  assert networks.relative_error(merged(q, k, v), expected) < 1e-5


def test_both_paths_have_the_same_gradient():
  q, k, v = qkv(9, 9)
  mask = jnp.asarray(np.tril(np.ones((9, 9), bool)))
  # The private function, since a public call of this size takes the other path.
  by_head = attention._attend_by_head
  with_lse = attention.attend_with_lse, functools.partial(by_head, mask=None, with_lse=True)
  masked = (
    lambda *qkv: (attention.attend(*qkv, mask=mask),),
    lambda *qkv: (by_head(*qkv, mask=mask, with_lse=False).out,),
  )
  total = lambda f, qkv: sum(jnp.sum(jnp.sin(x)) for x in f(*qkv))
  for paths in (with_lse, masked):
    first, second = (jax.jit(jax.grad(functools.partial(total, f)))((q, k, v)) for f in paths)
    for a, b in zip(first, second, strict=True):
      assert networks.relative_error(a, b) < 1e-5


@pytest.mark.parametrize("n", [6, 128])
def test_both_streams_together_are_attention_over_their_concatenation(n):
  """The paper concatenates, attends and splits; gradients are compared too."""
  text, image = (Projected(*qkv(size, size)) for size in (1, n))

  def as_written(text: Projected, image: Projected) -> tuple[jax.Array, jax.Array]:
    joined = (jnp.concatenate(pair, axis=1) for pair in zip(text, image))
    return tuple(jnp.split(attention.attend(*joined), [1], axis=1))

  total = lambda f, streams: sum(jnp.sum(jnp.sin(3 * x)) for x in f(*streams))
  ours, expected = (f(text, image) for f in (attention.attend_together, as_written))
  gradients = (
    jax.jit(jax.grad(functools.partial(total, f)))((text, image)) for f in (attention.attend_together, as_written)
  )
  for a, b in zip(
    (*ours, *jax.tree.leaves(next(gradients))), (*expected, *jax.tree.leaves(next(gradients))), strict=True
  ):
    assert networks.relative_error(a, b) < 1e-5
