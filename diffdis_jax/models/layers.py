"""The layers that all networks here share: numerics policy, attention, transformer parts, time embedding.

Parameters are f32. Matrix products and convolutions run in `dtype` (bf16 or f32); normalisations and softmax in f32.
Images are NHWC.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

F32 = jnp.float32
_STOOD_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar("stood_for", default=None)


def linear(
  din: int, dout: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, use_bias: bool = True, init_scale: float = 1.0
) -> nnx.Linear:
  """Its kernel starts as `init_scale` times LeCun's normal."""
  kernel_init = lambda *args: init_scale * nnx.initializers.lecun_normal()(*args)
  return nnx.Linear(din, dout, use_bias=use_bias, dtype=dtype, param_dtype=F32, kernel_init=kernel_init, rngs=rngs)


def conv(
  din: int, dout: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, stride: int = 1, padding: str | tuple = "SAME"
) -> nnx.Conv:
  """Convolution with PyTorch's symmetric padding: (size - 1) / 2 on either side, whatever the stride."""
  if padding == "SAME":
    padding = ((size // 2, size // 2),) * 2
  return nnx.Conv(din, dout, (size, size), strides=stride, padding=padding, dtype=dtype, param_dtype=F32, rngs=rngs)


def variance(x: Float[Array, "..."], mean: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
  """Variance over `axes`, f32: of f32 inputs in a second pass over them; of bf16 ones, whose own rounding is larger
  than what is lost, from sums that one pass takes together with the mean's."""
  x32 = x.astype(F32)
  if x.dtype == F32:
    return jnp.square(x32 - mean).mean(axes, keepdims=True)
  return jnp.maximum(jnp.square(x32).mean(axes, keepdims=True) - jnp.square(mean), 0.0)


class GroupNorm(nnx.Module):
  """Group normalisation over image positions, computed in f32, returned in the input's dtype.

  Sums are taken by channel and only then joined to groups: on a TPU a group's few channels, as an axis of their own,
  would be padded to 128 lanes.
  """

  def __init__(self, width: int, *, groups: int, eps: float, rngs: nnx.Rngs):
    self.norm = nnx.GroupNorm(width, num_groups=groups, epsilon=eps, dtype=F32, param_dtype=F32, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    groups, width = self.norm.num_groups, x.shape[-1]

    def over_group(by_channel: Float[Array, "b 1 1 c"]) -> Float[Array, "b 1 1 c"]:
      joined = rearrange(by_channel, "b h w (g e) -> b h w g e", g=groups).mean(axis=-1, keepdims=True)
      return rearrange(jnp.broadcast_to(joined, (*joined.shape[:-1], width // groups)), "b h w g e -> b h w (g e)")

    of_channel = x.astype(F32).mean(axis=(1, 2), keepdims=True)
    mean = over_group(of_channel)
    if x.dtype == F32:
      var = over_group(jnp.square(x - mean).mean(axis=(1, 2), keepdims=True))
    else:
      # Within each channel, and between them.
      var = over_group(variance(x, of_channel, (1, 2)) + jnp.square(of_channel - mean))
    # As one factor and one term a channel, so that gradients are two sums by channel, of which all others follow.
    scale = jax.lax.rsqrt(var + self.norm.epsilon) * self.norm.scale[...]
    shift = self.norm.bias[...] - mean * scale
    return (x.astype(F32) * scale + shift).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer normalisation computed in f32, returned in the input's dtype."""

  def __init__(self, width: int, *, rngs: nnx.Rngs, eps: float = 1e-5):
    self.norm = nnx.LayerNorm(width, epsilon=eps, dtype=F32, param_dtype=F32, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    mean = x.astype(F32).mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(variance(x, mean, (-1,)) + self.norm.epsilon) * self.norm.scale[...]
    return ((x.astype(F32) - mean) * scale + self.norm.bias[...]).astype(x.dtype)


def pair(first: Float[Array, "b ..."], second: Float[Array, "b ..."], parts: int = 1) -> Float[Array, "2*b ..."]:
  """Two batches as one. Rows that lie on devices in `parts` parts (sharding.batch_parts) stay where they are: of each
  part, first one's rows, then the other's."""
  split = lambda x: x.reshape(parts, -1, *x.shape[1:])
  return jnp.concatenate([split(first), split(second)], axis=1).reshape(-1, *first.shape[1:])


def unpair(x: Float[Array, "2*b ..."], parts: int = 1) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
  """What `pair` made one of."""
  first, second = jnp.split(x.reshape(parts, -1, *x.shape[1:]), 2, axis=1)
  return first.reshape(-1, *x.shape[1:]), second.reshape(-1, *x.shape[1:])


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
  return _attend(q, k, v, mask, with_lse=True)


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
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(F32).min)

  scores = scores_of(q)
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
  q, k, v, weights, total, attended = kept
  gradient, of_lse = gradients
  gradient = gradient.astype(F32) / total[..., None]
  of_v = jnp.einsum("bhnm,bnhd->bmhd", weights, gradient.astype(v.dtype))
  # d softmax: w (g·v - g·out), and w for lse; times the scores' scale, here where arrays are small.
  scale = 1.0 / math.sqrt(q.shape[-1])
  gradient = (gradient * scale).astype(v.dtype)
  mean = jnp.sum(gradient.astype(F32) * attended.astype(F32), axis=-1)
  if with_lse:
    mean = mean - of_lse * scale / total
  of_weights = jnp.einsum("bnhd,bmhd->bhnm", gradient, v, preferred_element_type=F32)
  of_scores = (weights.astype(F32) * (of_weights - rearrange(mean, "b n h -> b h n 1"))).astype(q.dtype)
  of_q = jnp.einsum("bhnm,bmhd->bnhd", of_scores, k)
  return of_q, jnp.einsum("bhnm,bnhd->bmhd", of_scores, q), of_v, None


_attend_at_once.defvjp(_attend_forward, _attend_backward)


def _attend_by_head(q: Array, k: Array, v: Array, *, mask: Array | None) -> tuple[Array, Array]:
  batch = q.shape[0]
  scale = 1.0 / math.sqrt(q.shape[-1])

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
  score = jnp.sum(q.astype(F32) * k.astype(F32), axis=-1) / math.sqrt(q.shape[-1])
  weight = jax.nn.sigmoid(score - lse)[..., None]
  return (attended.astype(F32) * (1.0 - weight) + v.astype(F32) * weight).astype(attended.dtype)


class Attention(nnx.Module):
  """Multi-head attention with PyTorch-style projections q, k, v, out.

  Args:
    width: width of the queries and of the output.
    context_width: width of the keys' and values' source; None for self-attention.
    num_heads: number of heads; must divide `width`.
    qkv_bias: whether q, k and v have a bias. Stable Diffusion's have none, CLIP's have one.
  """

  def __init__(
    self,
    width: int,
    *,
    num_heads: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    context_width: int | None = None,
    qkv_bias: bool = False,
  ):
    context_width = width if context_width is None else context_width
    self.num_heads = num_heads
    self.q = linear(width, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
    self.k = linear(context_width, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
    self.v = linear(context_width, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
    self.out = linear(width, width, dtype=dtype, rngs=rngs)

  def project(
    self, x: Float[Array, "b n d"], context: Float[Array, "b m c"] | None = None
  ) -> tuple[Array, Array, Array]:
    """q, k and v, each [b, n, heads, d / heads]."""
    context = x if context is None else context
    heads = functools.partial(rearrange, pattern="b n (h d) -> b n h d", h=self.num_heads)
    return heads(self.q(x)), heads(self.k(context)), heads(self.v(context))

  def output(self, attended: Float[Array, "b n h d"]) -> Float[Array, "b n d"]:
    return self.out(rearrange(attended, "b n h d -> b n (h d)"))

  def __call__(
    self,
    x: Float[Array, "b n d"],
    context: Float[Array, "b m c"] | None = None,
    *,
    mask: Bool[Array, "n m"] | None = None,
  ) -> Float[Array, "b n d"]:
    return self.output(attend(*self.project(x, context), mask=mask))


class GEGLU(nnx.Module):
  """Stable Diffusion's feed-forward network: value * gelu(gate), exact gelu."""

  def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, ratio: int = 4):
    self.dtype = dtype
    self.proj = linear(width, 2 * ratio * width, dtype=dtype, rngs=rngs)
    self.out = linear(ratio * width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    # Its columns' halves one by one: as one product, the gradients of both would have to be joined again.
    kernels, biases = (
      jnp.split(part[...].astype(self.dtype), 2, axis=-1) for part in (self.proj.kernel, self.proj.bias)
    )
    value, gate = (x @ kernel + bias for kernel, bias in zip(kernels, biases))
    return self.out(value * jax.nn.gelu(gate, approximate=False))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """CLIP's activation."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}


class MLP(nnx.Module):
  """Two linear layers with an activation of `ACTIVATIONS` between."""

  def __init__(self, width: int, hidden: int, *, activation: str, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.activation = ACTIVATIONS[activation]
    self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    return self.fc2(self.activation(self.fc1(x)))


class TransformerLayer(nnx.Module):
  """Pre-norm transformer layer, as in CLIP: x + attention(norm(x)), then x + MLP(norm(x))."""

  def __init__(self, width: int, *, num_heads: int, mlp_width: int, activation: str, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.norm1 = LayerNorm(width, rngs=rngs)
    self.attn = Attention(width, num_heads=num_heads, qkv_bias=True, dtype=dtype, rngs=rngs)
    self.norm2 = LayerNorm(width, rngs=rngs)
    self.mlp = MLP(width, mlp_width, activation=activation, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"], *, mask: Bool[Array, "n n"] | None = None) -> Float[Array, "b n d"]:
    x = x + self.attn(self.norm1(x), mask=mask)
    return x + self.mlp(self.norm2(x))


def sinusoidal(t: Int[Array, "b"], width: int) -> Float[Array, "b d"]:
  """Sinusoidal embedding of timesteps as in Stable Diffusion: [cos, sin], frequencies 10000^(-i / (width / 2)), f32."""
  half = width // 2
  frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=F32) / half)
  angles = t.astype(F32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
  """Sinusoidal embedding followed by a two-layer SiLU network."""

  def __init__(self, din: int, dout: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.din, self.dtype = din, dtype
    self.fc1 = linear(din, dout, dtype=dtype, rngs=rngs)
    self.fc2 = linear(dout, dout, dtype=dtype, rngs=rngs)

  def __call__(self, t: Int[Array, "b"]) -> Float[Array, "b d"]:
    return self.fc2(jax.nn.silu(self.fc1(sinusoidal(t, self.din).astype(self.dtype))))
