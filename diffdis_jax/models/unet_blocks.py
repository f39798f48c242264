"""The blocks of Stable Diffusion v1's UNet: residual block, attention block, resampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffdis_jax.models.layers import GEGLU, Attention, GroupNorm, LayerNorm, conv, linear


class ResnetBlock(nnx.Module):
  """GroupNorm, SiLU and convolution, twice, with the time embedding added in between.

  If the widths differ, the shortcut is a 1x1 convolution. The autoencoder uses it without time (`time_width=None`).
  """

  def __init__(
    self,
    din: int,
    dout: int,
    *,
    time_width: int | None,
    groups: int,
    eps: float,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.norm1 = GroupNorm(din, groups=groups, eps=eps, rngs=rngs)
    self.conv1 = conv(din, dout, 3, dtype=dtype, rngs=rngs)
    self.time = None if time_width is None else linear(time_width, dout, dtype=dtype, rngs=rngs)
    self.norm2 = GroupNorm(dout, groups=groups, eps=eps, rngs=rngs)
    self.conv2 = conv(dout, dout, 3, dtype=dtype, rngs=rngs)
    self.shortcut = None if din == dout else conv(din, dout, 1, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"], temb: Float[Array, "b d"] | None = None) -> Float[Array, "b h w e"]:
    h = self.conv1(jax.nn.silu(self.norm1(x)))
    if self.time is not None:
      assert temb is not None
      # The SiLU is here, since each block has its own projection of the shared embedding.
      h = h + self.time(jax.nn.silu(temb))[:, None, None, :]
    h = self.conv2(jax.nn.silu(self.norm2(h)))
    return h + (x if self.shortcut is None else self.shortcut(x))


class BasicTransformerBlock(nnx.Module):
  """Self-attention, cross-attention to the text condition, and GEGLU, each with a norm before it and a residual."""

  def __init__(self, width: int, *, num_heads: int, context_width: int, dtype: DTypeLike, rngs: nnx.Rngs):
    self.norm1 = LayerNorm(width, rngs=rngs)
    self.attn1 = Attention(width, num_heads=num_heads, dtype=dtype, rngs=rngs)
    self.norm2 = LayerNorm(width, rngs=rngs)
    self.attn2 = Attention(width, num_heads=num_heads, context_width=context_width, dtype=dtype, rngs=rngs)
    self.norm3 = LayerNorm(width, rngs=rngs)
    self.ff = GEGLU(width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b l e"]) -> Float[Array, "b n d"]:
    x = x + self.attn1(self.norm1(x))
    # A separate method, since fusion has its own self-attention over one more token, and the same rest.
    return self.after_self_attention(x, c)

  def after_self_attention(self, x: Float[Array, "b n d"], c: Float[Array, "b l e"]) -> Float[Array, "b n d"]:
    x = x + self.attn2(self.norm2(x), c)
    return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
  """Stable Diffusion's attention block: image to tokens, one transformer block, tokens to image, residual."""

  def __init__(self, width: int, *, num_heads: int, context_width: int, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
    self.norm = GroupNorm(width, groups=groups, eps=1e-6, rngs=rngs)
    # 1x1 convolutions, like v1's weights; version 2 has matrices.
    self.proj_in = conv(width, width, 1, dtype=dtype, rngs=rngs)
    self.block = BasicTransformerBlock(width, num_heads=num_heads, context_width=context_width, dtype=dtype, rngs=rngs)
    self.proj_out = conv(width, width, 1, dtype=dtype, rngs=rngs)

  def to_tokens(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
    return rearrange(self.proj_in(self.norm(x)), "b h w c -> b (h w) c")

  def to_image(self, tokens: Float[Array, "b n c"], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Turn tokens back into an image, and add the block's input `x`."""
    return x + self.proj_out(rearrange(tokens, "b (h w) c -> b h w c", h=x.shape[1]))

  def __call__(self, x: Float[Array, "b h w c"], c: Float[Array, "b l e"]) -> Float[Array, "b h w c"]:
    return self.to_image(self.block(self.to_tokens(x), c), x)


class Downsample(nnx.Module):
  """A 3x3 convolution of stride 2. The autoencoder pads only on the right and bottom, the UNet on all sides."""

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs, asymmetric: bool = False):
    # The autoencoder's padding equals PyTorch's F.pad(x, (0, 1, 0, 1)) before an unpadded convolution.
    padding = ((0, 1), (0, 1)) if asymmetric else "SAME"
    self.conv = conv(width, width, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    return self.conv(x)


class Upsample(nnx.Module):
  """Nearest-neighbour doubling of the resolution, and a 3x3 convolution."""

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.conv = conv(width, width, 3, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    # For a factor of 2, this equals PyTorch's `nearest`.
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
