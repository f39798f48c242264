"""Attention without parameters: the kernels, which of them runs, and one more key merged in exactly.

What it computes is softmax(q k / √d) v. Everything here is how: which form is fast where, and what is kept for the
backward pass.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

F32 = jnp.float32
_STOOD_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar("stood_for", default=None)


@contextlib.contextmanager
def standing_in_for(platform: str) -> Iterator[None]:
  """Around what is traced for devices that stand in for others, of this platform."""
  token = _STOOD_FOR.set(platform)
  try:
    yield
  finally:
    _STOOD_FOR.reset(token)


def platform() -> str:
  """What the code being traced will run on: the surrounding mesh's devices (sharding.tracing), or what they stand in
  for; without a mesh the default."""
  if stood_for := _STOOD_FOR.get():
    return stood_for
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


class Projected(NamedTuple):
  """Queries, keys and values by head."""

  q: Float[Array, "b n h d"]
  k: Float[Array, "b m h d"]
  v: Float[Array, "b m h d"]


def attend(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  *,
  mask: Bool[Array, "n m"] | None = None,
) -> Float[Array, "b n h d"]:
  """Softmax attention, softmax in f32, scaled by 1/√d. `mask` is True where a query may look."""
  return _attend(q, k, v, mask, with_lse=False)[0]


def attend_with_lse(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  *,
  mask: Bool[Array, "n m"] | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
  """Attention, and the logarithm of each softmax's denominator, f32, with which `with_one_more` goes on."""
  attended, lse = _attend(q, k, v, mask, with_lse=True)
  assert lse is not None
  return attended, lse


def _attend(q: Array, k: Array, v: Array, mask: Array | None, *, with_lse: bool) -> tuple[Array, Array | None]:
  """On CPU, batched small matrix products are slow and keep every score for the backward pass; one head of one sample
  at a time was 3 times faster with gradients at 257 tokens and 1.5 times at 1024, and no faster at 64."""
  if platform() == "cpu" and q.shape[1] * k.shape[1] >= 128 * 128:
    return _attend_by_head(q, k, v, mask=mask)
  return _attend_at_once(q, k, v, mask, with_lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_at_once(q: Array, k: Array, v: Array, mask: Array | None, with_lse: bool) -> tuple[Array, Array | None]:
  return _attend_forward(q, k, v, mask, with_lse)[0]


def _attend_forward(
  q: Array, k: Array, v: Array, mask: Array | None, with_lse: bool
) -> tuple[tuple[Array, Array | None], tuple[Array, ...]]:
  """Weights, not scores, are kept for the backward pass, in the compute dtype. A column of ones beside v sums them in
  the same product, and only its result is divided by the sum: at 1024 tokens, passes over scores and weights are what
  attention costs."""

  def scores_of(q: Array) -> Array:
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=F32) * (1.0 / math.sqrt(q.shape[-1]))
    # The least number rather than -inf, so that a row in which nothing is allowed is no NaN.
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(F32).min)

  scores = scores_of(q)
  # Less the largest score, which divides out again, so that no exponential overflows.
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(v.dtype)
  with_ones = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  sums = jnp.einsum("bhnm,bmhd->bnhd", weights, with_ones, preferred_element_type=F32)
  total = sums[..., -1]
  attended = (sums[..., :-1] / total[..., None]).astype(v.dtype)
  lse = None
  if with_lse:
    # The largest scores once more: to hand out those above, the TPU compiler would store every score.
    top = scores_of(jax.lax.optimization_barrier(q)).max(axis=-1)
    lse = rearrange(top, "b h n -> b n h") + jnp.log(total)
  return (attended, lse), (q, k, v, weights, total, attended)


def _attend_backward(
  with_lse: bool, kept: tuple[Array, ...], gradients: tuple[Array, Array | None]
) -> tuple[Array, Array, Array, None]:
  del with_lse
  q, k, v, weights, total, attended = kept
  gradient, of_lse = gradients
  gradient = gradient.astype(F32) / total[..., None]
  of_v = jnp.einsum("bhnm,bnhd->bmhd", weights, gradient.astype(v.dtype))
  # d softmax: w (g·v - g·out), and w for lse; times the scores' scale, here where arrays are small.
  scale = 1.0 / math.sqrt(q.shape[-1])
  gradient = (gradient * scale).astype(v.dtype)
  mean = jnp.sum(gradient.astype(F32) * attended.astype(F32), axis=-1)
  if of_lse is not None:
    mean = mean - of_lse * scale / total
  of_weights = jnp.einsum("bnhd,bmhd->bhnm", gradient, v, preferred_element_type=F32)
  of_scores = (weights.astype(F32) * (of_weights - rearrange(mean, "b n h -> b h n 1"))).astype(q.dtype)
  of_q = jnp.einsum("bhnm,bmhd->bnhd", of_scores, k)
  return of_q, jnp.einsum("bhnm,bnhd->bmhd", of_scores, q), of_v, None


_attend_at_once.defvjp(_attend_forward, _attend_backward)


def _attend_by_head(q: Array, k: Array, v: Array, *, mask: Array | None) -> tuple[Array, Array]:
  batch = q.shape[0]
  scale = 1.0 / math.sqrt(q.shape[-1])

  # Scores of one head stay in a core's cache, and are computed again in the backward pass instead of being kept.
  @jax.checkpoint
  def one(qkv: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    q, k, v = qkv
    scores = jnp.dot(q, k.T, preferred_element_type=F32) * scale
    if mask is not None:
      scores = jnp.where(mask, scores, jnp.finfo(F32).min)
    return jnp.dot(jax.nn.softmax(scores, axis=-1).astype(v.dtype), v), jax.nn.logsumexp(scores, axis=-1)

  split = functools.partial(rearrange, pattern="b n h d -> (b h) n d")
  attended, lse = jax.lax.map(one, (split(q), split(k), split(v)))
  return rearrange(attended, "(b h) n d -> b n h d", b=batch), rearrange(lse, "(b h) n -> b n h", b=batch)


def with_one_more(
  attended: Float[Array, "b n h d"],
  lse: Float[Array, "b n h"],
  q: Float[Array, "b n h d"],
  k: Float[Array, "b 1 h d"],
  v: Float[Array, "b 1 h d"],
) -> Float[Array, "b n h d"]:
  """What attention over one more key would have given, exactly: softmax of [scores, s] is a mean of the two parts
  weighed by the sigmoid of s - lse. The other keys' number, a power of two on images, stays what it is."""
  # Its share of the whole denominator: e^s / (e^lse + e^s) = sigmoid(s - lse), which cannot overflow.
  score = jnp.sum(q.astype(F32) * k.astype(F32), axis=-1) / math.sqrt(q.shape[-1])
  weight = jax.nn.sigmoid(score - lse)[..., None]
  return (attended.astype(F32) * (1.0 - weight) + v.astype(F32) * weight).astype(attended.dtype)


def attend_together(text: Projected, image: Projected) -> tuple[Float[Array, "b 1 h d"], Float[Array, "b n h d"]]:
  """Attention over the tokens [text, image], split again into the text token's and the image tokens' result.

  Without the concatenation: each stream attends to the image tokens, and the text token's key is merged in exactly
  (`with_one_more`). So the image tokens' number stays a power of two, which fills a TPU's tiles; n + 1 would not.
  """
  of_text = with_one_more(*attend_with_lse(text.q, image.k, image.v), text.q, text.k, text.v)
  of_image = with_one_more(*attend_with_lse(*image), image.q, text.k, text.v)
  return of_text, of_image
