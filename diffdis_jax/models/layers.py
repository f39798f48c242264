"""The layers that all networks here share: normalisation, transformer parts and the time embedding.

Parameters are f32. Matrix products and convolutions are computed in `dtype` (bf16 or f32), norms and softmax in f32.
Images are NHWC.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from diffdis_jax.models import remat
from diffdis_jax.models.attention import Projected, attend, platform

F32 = jnp.float32
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def by_rows(f: Callable[[Array], Array], x: Float[Array, "*rows d"]) -> Float[Array, "*rows e"]:
  """Compute f(x) row by row; on a CPU, with all rows along one axis.

  A kernel's gradient sums over rows. If the rows have two axes, XLA's CPU compiler copies a factor and then uses a
  product that is 3 to 4 times slower. On a TPU, joining the axes would be a copy if the tokens do not fill tiles.
  """
  if x.ndim <= 2 or platform() != "cpu":
    return f(x)
  return f(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Linear(nnx.Linear):
  """A linear layer that is computed `by_rows`."""

  def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows e"]:
    return by_rows(super().__call__, x)


def linear(
  din: int, dout: int, *, dtype: DTypeLike, rngs: nnx.Rngs, use_bias: bool = True, init_scale: float = 1.0
) -> Linear:
  """Return a linear layer whose initial kernel is `init_scale` times LeCun's normal."""

  def kernel_init(*args: Any) -> Array:
    return init_scale * nnx.initializers.lecun_normal()(*args)

  return Linear(din, dout, use_bias=use_bias, dtype=dtype, param_dtype=F32, kernel_init=kernel_init, rngs=rngs)


def convolve(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "kh kw c d"],
  strides: tuple[int, int],
  padding: Sequence[tuple[int, int]],
  **settings: Any,
) -> Float[Array, "b h_out w_out d"]:
  """Compute `jax.lax.conv_general_dilated`; on a CPU as one matrix product, if there are few positions or the patches
  do not overlap.

  For the gradient of x, XLA's CPU compiler reverses the kernel, which takes longer than the product if the kernel is
  large; and it convolves images smaller than the kernel by plain loops.
  """
  size, channels = kernel.shape[:2], kernel.shape[-1]
  sides = [(n + sum(pad) - k) // s + 1 for n, pad, k, s in zip(x.shape[1:3], padding, size, strides, strict=True)]
  rows = len(x) * math.prod(sides)
  if platform() != "cpu" or (rows > channels and size != strides):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

  def met(axis: int, offset: int) -> slice:
    """Return the positions along an axis at which the kernel's entry at `offset` is applied."""
    return slice(offset, offset + (sides[axis] - 1) * strides[axis] + 1, strides[axis])

  # In the order of the kernel's axes, so that reshaping the kernel copies nothing.
  patches = [padded[:, met(0, i), met(1, j)] for i in range(size[0]) for j in range(size[1])]
  product = jnp.concatenate(patches, axis=-1).reshape(rows, -1) @ kernel.reshape(-1, channels)
  return product.reshape(len(x), *sides, channels)


def conv(
  din: int,
  dout: int,
  size: int,
  *,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
  stride: int = 1,
  padding: str | tuple = "SAME",
  use_bias: bool = True,
) -> nnx.Conv:
  """Return a convolution with PyTorch's symmetric padding: (size - 1) / 2 on each side, for any stride."""
  # With stride 2, Flax's "SAME" pads on one side only: images would be shifted by a pixel against PyTorch's.
  if padding == "SAME":
    padding = ((size // 2, size // 2),) * 2
  numerics: dict[str, Any] = dict(dtype=dtype, param_dtype=F32, conv_general_dilated=convolve)
  return nnx.Conv(din, dout, (size, size), strides=stride, padding=padding, use_bias=use_bias, **numerics, rngs=rngs)


def variance(x: Float[Array, "..."], mean: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
  """Compute the variance over `axes`, f32. For f32 inputs this is a second pass; for bf16 inputs, whose rounding is the
  larger error, it uses the mean of squares, which one pass computes together with the mean."""
  x32 = x.astype(F32)
  if x.dtype == F32:
    return jnp.square(x32 - mean).mean(axes, keepdims=True)
  return jnp.maximum(jnp.square(x32).mean(axes, keepdims=True) - jnp.square(mean), 0.0)


class GroupNorm(nnx.Module):
  """Group normalisation over image positions, computed in f32 and returned in the input's dtype.

  Sums are computed by channel and then added up by group: on a TPU a separate axis for a group's few channels would be
  padded to 128 lanes.
  """

  def __init__(self, width: int, *, groups: int, eps: float, rngs: nnx.Rngs):
    # Any, since flax's types allow an absent scale or bias.
    self.norm: Any = nnx.GroupNorm(width, num_groups=groups, epsilon=eps, dtype=F32, param_dtype=F32, rngs=rngs)

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
      # The variance within each channel, plus the variance between channels.
      var = over_group(variance(x, of_channel, (1, 2)) + jnp.square(of_channel - mean))
    # One factor and one term for each channel, so that the gradients need only two sums by channel.
    scale = jax.lax.rsqrt(var + self.norm.epsilon) * self.norm.scale[...]
    shift = self.norm.bias[...] - mean * scale
    return (x.astype(F32) * scale + shift).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer normalisation, computed in f32 and returned in the input's dtype."""

  def __init__(self, width: int, *, rngs: nnx.Rngs, eps: float = 1e-5):
    self.norm: Any = nnx.LayerNorm(width, epsilon=eps, dtype=F32, param_dtype=F32, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    mean = x.astype(F32).mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(variance(x, mean, (-1,)) + self.norm.epsilon) * self.norm.scale[...]
    return ((x.astype(F32) - mean) * scale + self.norm.bias[...]).astype(x.dtype)


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
    dtype: DTypeLike,
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

  def project(self, x: Float[Array, "b n d"], context: Float[Array, "b m c"] | None = None) -> Projected:
    """Return q, k and v, each [b, n, heads, d / heads]."""
    context = x if context is None else context
    # Named for remat's policy `attention`, which keeps these three products and computes all else again.
    q, k, v = (checkpoint_name(y, remat.ATTENTION_INPUTS) for y in (self.q(x), self.k(context), self.v(context)))
    heads = functools.partial(rearrange, pattern="b n (h d) -> b n h d", h=self.num_heads)
    return Projected(heads(q), heads(k), heads(v))

  def output(self, attended: Float[Array, "b n h d"]) -> Float[Array, "b n h*d"]:
    """Concatenate the heads, and apply the last projection."""
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

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs, ratio: int = 4):
    self.dtype = dtype
    self.proj: Any = linear(width, 2 * ratio * width, dtype=dtype, rngs=rngs)
    self.out = linear(ratio * width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    # The halves of the columns are two products: after one product, the gradients of both would have to be joined.
    kernels, biases = (
      jnp.split(part[...].astype(self.dtype), 2, axis=-1) for part in (self.proj.kernel, self.proj.bias)
    )
    value, gate = (
      by_rows(lambda x, kernel=kernel, bias=bias: x @ kernel + bias, x) for kernel, bias in zip(kernels, biases)
    )
    return self.out(value * jax.nn.gelu(gate, approximate=False))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Compute CLIP's activation, x · sigmoid(1.702 x)."""
  return x * jax.nn.sigmoid(1.702 * x)


# The exact GELU, as in PyTorch: jax.nn.gelu's default is the tanh approximation.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}


class MLP(nnx.Module):
  """Two linear layers, with an activation of `ACTIVATIONS` between them."""

  def __init__(self, width: int, hidden: int, *, activation: str, dtype: DTypeLike, rngs: nnx.Rngs):
    self.activation = ACTIVATIONS[activation]
    self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    return self.fc2(self.activation(self.fc1(x)))


class TransformerLayer(nnx.Module):
  """Pre-norm transformer layer, as in CLIP: x + attention(norm(x)), then x + MLP(norm(x))."""

  def __init__(self, width: int, *, num_heads: int, mlp_width: int, activation: str, dtype: DTypeLike, rngs: nnx.Rngs):
    self.norm1 = LayerNorm(width, rngs=rngs)
    self.attn = Attention(width, num_heads=num_heads, qkv_bias=True, dtype=dtype, rngs=rngs)
    self.norm2 = LayerNorm(width, rngs=rngs)
    self.mlp = MLP(width, mlp_width, activation=activation, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"], *, mask: Bool[Array, "n n"] | None = None) -> Float[Array, "b n d"]:
    x = x + self.attn(self.norm1(x), mask=mask)
    return x + self.mlp(self.norm2(x))


def sinusoidal(t: Int[Array, "b"], width: int) -> Float[Array, "b d"]:
  """Compute the sinusoidal embedding of timesteps as in Stable Diffusion: [cos, sin], frequencies 10000^(-i / (width /
  2)), f32."""
  # In f32 for any compute dtype: bf16 has only 8 bits for an angle up to 1000. Cosines come first, as with diffusers'
  # `flip_sin_to_cos`.
  half = width // 2
  frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=F32) / half)
  angles = t.astype(F32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
  """Sinusoidal embedding followed by a two-layer SiLU network."""

  def __init__(self, din: int, dout: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.din, self.dtype = din, dtype
    self.fc1 = linear(din, dout, dtype=dtype, rngs=rngs)
    self.fc2 = linear(dout, dout, dtype=dtype, rngs=rngs)

  def __call__(self, t: Int[Array, "b"]) -> Float[Array, "b d"]:
    return self.fc2(jax.nn.silu(self.fc1(sinusoidal(t, self.din).astype(self.dtype))))
