"""Attention without parameters: its kernels, the choice of a kernel, and the exact merge of one more key.

All kernels compute softmax(q k / √d) v. They differ in where they are fast (KERNELS), and in what they keep for the
backward pass.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from diffdis_jax.config.model import AUTO
from diffdis_jax.errors import UserError
from diffdis_jax.models import attention_tpu
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import Attended

F32 = jnp.float32
_STOOD_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar("stood_for", default=None)
_FORCED: contextvars.ContextVar[str] = contextvars.ContextVar("forced", default=AUTO)


@contextlib.contextmanager
def standing_in_for(platform: str) -> Iterator[None]:
  """Trace the block for `platform`, whose devices other devices stand in for."""
  token = _STOOD_FOR.set(platform)
  try:
    yield
  finally:
    _STOOD_FOR.reset(token)


def platform() -> str:
  """Return the platform for which code is traced: that of the surrounding mesh's devices (sharding.tracing), or the one
  that they stand in for. Without a mesh it is the default."""
  return _STOOD_FOR.get() or _compiled_for()


def _compiled_for() -> str:
  """Return the platform whose compiler compiles the code."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  name = jax.default_backend() if device is None else device.platform
  return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def by(kernel: str) -> Iterator[None]:
  """Trace the block with this one of KERNELS wherever it can run, or with the fastest (AUTO)."""
  token = _FORCED.set(kernel)
  try:
    yield
  finally:
    _FORCED.reset(token)


class Streams(NamedTuple):
  """The results of joint attention over the text token and the image tokens, split by stream."""

  text: Float[Array, "b 1 h d"]
  image: Float[Array, "b n h d"]


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
  """Compute attention scaled by 1/√d, with its softmax in f32. `mask` is True where a query may attend to a key."""
  return _choose(q, k, mask).run(q, k, v, mask, False).out


def attend_with_lse(q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]) -> Attended:
  """Compute attention, and the logarithm of each softmax's denominator, f32, for `merge_extra_key`."""
  return _choose(q, k, None, with_lse=True).run(q, k, v, None, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_at_once(q: Array, k: Array, v: Array, mask: Array | None, with_lse: bool) -> Attended:
  return _attend_forward(q, k, v, mask, with_lse).result


def _attend_forward(q: Array, k: Array, v: Array, mask: Array | None, with_lse: bool) -> attention_tpu.Forward:
  """Compute attention, and keep the weights in the compute dtype, not the scores, for the backward pass. A column of
  ones beside v makes the product also sum the weights, and only the result is divided by the sum: at 1024 tokens,
  passes over scores and weights take most of attention's time."""

  def scores_of(q: Array) -> Array:
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=F32) * (1.0 / math.sqrt(q.shape[-1]))
    # The smallest number and not -inf, so that a row in which every key is masked is no NaN.
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(F32).min)

  scores = scores_of(q)
  # Subtract the largest score, which cancels in the quotient, so that no exponential overflows.
  # Cast the weights before they are summed, so that the divisor is the sum of the very weights that multiply v.
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(v.dtype)
  with_ones = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  sums = jnp.einsum("bhnm,bmhd->bnhd", weights, with_ones, preferred_element_type=F32)
  total = sums[..., -1]
  attended = (sums[..., :-1] / total[..., None]).astype(v.dtype)
  lse = None
  if with_lse:
    # Compute the largest scores again: to return those above, the TPU compiler would store every score.
    top = scores_of(jax.lax.optimization_barrier(q)).max(axis=-1)
    lse = rearrange(top, "b h n -> b n h") + jnp.log(total)
  return attention_tpu.Forward(Attended(attended, lse), (q, k, v, weights, total, attended))


def _attend_backward(with_lse: bool, kept: tuple[Array, ...], gradients: Attended) -> tuple[Array, Array, Array, None]:
  del with_lse
  q, k, v, weights, total, attended = kept
  gradient, of_lse = gradients
  gradient = gradient.astype(F32) / total[..., None]
  of_v = jnp.einsum("bhnm,bnhd->bmhd", weights, gradient.astype(v.dtype))
  # The derivative of softmax is w (g·v - g·out), and w for lse. Scale here, where the arrays are small.
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


def _attend_by_head(q: Array, k: Array, v: Array, mask: Array | None, with_lse: bool) -> Attended:
  del with_lse
  batch = q.shape[0]
  scale = 1.0 / math.sqrt(q.shape[-1])

  # The scores of one head stay in a core's cache, and the backward pass computes them again.
  @jax.checkpoint
  def one(qkv: tuple[Array, Array, Array]) -> Attended:
    q, k, v = qkv
    scores = jnp.dot(q, k.T, preferred_element_type=F32) * scale
    if mask is not None:
      scores = jnp.where(mask, scores, jnp.finfo(F32).min)
    return Attended(jnp.dot(jax.nn.softmax(scores, axis=-1).astype(v.dtype), v), jax.nn.logsumexp(scores, axis=-1))

  split = functools.partial(rearrange, pattern="b n h d -> (b h) n d")
  attended, lse = jax.lax.map(one, (split(q), split(k), split(v)))
  return Attended(rearrange(attended, "(b h) n d -> b n h d", b=batch), rearrange(lse, "(b h) n -> b n h", b=batch))


def _attend_on_tpu(q: Array, k: Array, v: Array, mask: Array | None, with_lse: bool) -> Attended:
  del mask, with_lse
  return attention_tpu.attend_with_lse(q, k, v)


def _attend_by_cudnn(q: Array, k: Array, v: Array, mask: Array | None, with_lse: bool) -> Attended:
  """Compute attention by cuDNN. Its gradient needs even numbers of tokens: an odd number gets a token of padding, which
  the given lengths exclude."""
  del mask, with_lse
  n, m = q.shape[1], k.shape[1]
  lengths: dict[str, Any] = {}
  if n % 2 or m % 2:
    rows = jnp.ones(len(q), jnp.int32)
    lengths = dict(query_seq_lengths=n * rows, key_value_seq_lengths=m * rows)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
  return Attended(jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)[:, :n], None)


class Kernel(NamedTuple):
  """One way to compute attention.

  Attributes:
    run: (q, k, v, mask, with_lse) -> Attended.
    platform: the platform for which it may be chosen.
    alone: whether no other platform can compile it.
    has_lse: whether it returns lse, with a gradient.
    is_possible: (q, k, mask) -> whether it can compute these.
    is_fast: (number of queries, number of keys) -> whether it is faster on its platform than `xla`.
  """

  run: Callable[..., Any]
  platform: str | None = None
  alone: bool = False
  has_lse: bool = True
  is_possible: Callable[[Array, Array, Array | None], bool] = lambda q, k, mask: True
  is_fast: Callable[[int, int], bool] = lambda n, m: True


# The kernels in the order in which they are tried.
KERNELS = {
  # Its time relative to `xla`, with gradients, for heads of 40 channels by the compiler's schedules for v5p: 1/2 for
  # 1024 x 1024 scores, 2/3 for 1024 x 77, 3/4 for 256 x 77, 1 for 256 x 256 with less memory, and 3/2 for 64 x 64.
  "pallas": Kernel(
    run=_attend_on_tpu,
    platform="tpu",
    alone=True,
    is_possible=lambda q, k, mask: (
      mask is None
      and q.shape[0] % sharding.batch_parts() == 0
      and attention_tpu.is_possible(q.shape[1], k.shape[1], q.shape[3])
    ),
    is_fast=lambda n, m: n >= 128 and n * m >= 128 * 128,
  ),
  # The sizes that cuDNN takes, also on GPUs before Hopper. JAX silently drops the gradient of its log-sum-exp.
  "cudnn": Kernel(
    run=_attend_by_cudnn,
    platform="gpu",
    alone=True,
    has_lse=False,
    is_possible=lambda q, k, mask: (
      mask is None and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    ),
    is_fast=lambda n, m: n >= 128 and n * m >= 128 * 128,
  ),
  # On CPUs, batched small matrix products are slow and keep every score for the backward pass. Computing one head of
  # one sample at a time was, with gradients, 3 times as fast at 257 tokens, 1.5 times at 1024, and not faster at 64.
  "xla_per_head": Kernel(
    run=_attend_by_head,
    platform="cpu",
    is_fast=lambda n, m: n * m >= 128 * 128,
  ),
  "xla": Kernel(run=_attend_at_once),
}


def _choose(q: Array, k: Array, mask: Array | None, *, with_lse: bool = False) -> Kernel:
  """Return the kernel that `by` asks for if it can run, or else the first that is fast on the platform for which code
  is traced.

  Raises UserError: this platform cannot compile the kernel that is asked for.
  """
  forced, compiled_for = _FORCED.get(), _compiled_for()
  if forced != AUTO and KERNELS[forced].alone and KERNELS[forced].platform != compiled_for:
    raise UserError(
      f"model.attention_kernel is {forced!r}, which runs on {KERNELS[forced].platform} alone, not on {compiled_for};"
      f" take {AUTO!r}"
    )
  for name, kernel in KERNELS.items():
    if not kernel.is_possible(q, k, mask) or (with_lse and not kernel.has_lse):
      continue
    if forced != AUTO:
      is_chosen = name in (forced, "xla")
    else:
      here = compiled_for if kernel.alone else platform()
      is_chosen = kernel.platform in (None, here) and kernel.is_fast(q.shape[1], k.shape[1])
    if is_chosen:
      return kernel
  raise AssertionError("xla takes everything")


def merge_extra_key(
  attended: Float[Array, "b n h d"],
  lse: Float[Array, "b n h"],
  q: Float[Array, "b n h d"],
  k: Float[Array, "b 1 h d"],
  v: Float[Array, "b 1 h d"],
) -> Float[Array, "b n h d"]:
  """Return exactly the attention over one more key: softmax of [scores, s] is a mean of both parts with the weight
  sigmoid(s - lse). So the number of the other keys, a power of two for images, is unchanged."""
  # The key's share of the denominator is e^s / (e^lse + e^s) = sigmoid(s - lse), which cannot overflow.
  score = jnp.sum(q.astype(F32) * k.astype(F32), axis=-1) / math.sqrt(q.shape[-1])
  weight = jax.nn.sigmoid(score - lse)[..., None]
  return (attended.astype(F32) * (1.0 - weight) + v.astype(F32) * weight).astype(attended.dtype)


def attend_with_one_more(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  more: Projected,
) -> Float[Array, "b n h d"]:
  """Compute attention to the keys of `k` and to the one of `more`, by a merge if the kernel returns lse."""
  if _choose(q, k, None).has_lse:
    attended, lse = attend_with_lse(q, k, v)
    assert lse is not None  # `with_lse` asks for it
    return merge_extra_key(attended, lse, q, more.k, more.v)
  # Such a kernel computes scores in pieces, so that no length is faster than another.
  return attend(q, jnp.concatenate([k, more.k], axis=1), jnp.concatenate([v, more.v], axis=1))


def attend_together(text: Projected, image: Projected) -> Streams:
  """Compute attention over the tokens [text, image], split by stream.

  Nothing is concatenated: each stream attends to the image tokens, and the text token's key is merged in exactly
  (`merge_extra_key`). So the number of keys stays a power of two, which fills a TPU's tiles; n + 1 keys would not.
  """
  return Streams(attend_with_one_more(text.q, image.k, image.v, text), attend_with_one_more(*image, text))
