"""Stable Diffusion's KL autoencoder (AutoencoderKL), with the widths and depths of a config."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffdis_jax.config.model import AutoencoderSize
from diffdis_jax.models.layers import Attention, GroupNorm, conv
from diffdis_jax.models.unet_blocks import Downsample, ResnetBlock, Upsample
from diffdis_jax.structs import Posterior

EPS = 1e-6  # the epsilon of the autoencoder's norms; the UNet's residual blocks have 1e-5
START_LOG_VARIANCE = -6.0


class LatentStatistic(nnx.Variable):
  """The shift and scale of latents to unit variance, which are measured during training and not trained."""


class MiddleAttention(nnx.Module):
  """Single-head self-attention over all positions, with a residual connection."""

  def __init__(self, width: int, *, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
    self.norm = GroupNorm(width, groups=groups, eps=EPS, rngs=rngs)
    self.attn = Attention(width, num_heads=1, qkv_bias=True, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    tokens = rearrange(self.norm(x), "b h w c -> b (h w) c")
    return x + rearrange(self.attn(tokens), "b (h w) c -> b h w c", h=x.shape[1])


class Middle(nnx.Module):
  """A residual block, optional attention, and another residual block."""

  def __init__(self, width: int, *, attention: bool, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
    # There is no time embedding, since images have no noise.
    resnet: dict[str, Any] = dict(time_width=None, groups=groups, eps=EPS, dtype=dtype, rngs=rngs)
    self.resnet1 = ResnetBlock(width, width, **resnet)
    self.attention = MiddleAttention(width, groups=groups, dtype=dtype, rngs=rngs) if attention else None
    self.resnet2 = ResnetBlock(width, width, **resnet)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    x = self.resnet1(x)
    if self.attention is not None:
      x = self.attention(x)
    return self.resnet2(x)


class Level(nnx.Module):
  """Residual blocks of one resolution, and optionally a change of resolution after them."""

  def __init__(
    self, din: int, dout: int, depth: int, *, resample: nnx.Module | None, groups: int, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    # The change of width is the first block's.
    widths = [din] + [dout] * depth
    self.resnets = nnx.List(
      ResnetBlock(a, b, time_width=None, groups=groups, eps=EPS, dtype=dtype, rngs=rngs)
      for a, b in zip(widths[:-1], widths[1:], strict=True)
    )
    self.resample = resample

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
    for resnet in self.resnets:
      x = resnet(x)
    return x if self.resample is None else self.resample(x)


class Autoencoder(nnx.Module):
  """A KL autoencoder between images in [-1, 1] and latents."""

  def __init__(self, size: AutoencoderSize, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.patch = size.patch
    widths, groups, latent_channels = size.widths, size.groups, size.latent_channels
    common: dict[str, Any] = dict(groups=groups, dtype=dtype, rngs=rngs)
    new_conv = functools.partial(conv, dtype=dtype, rngs=rngs)
    last = len(widths) - 1

    self.conv_in = new_conv(3 * size.patch**2, widths[0], 3)
    self.down = nnx.List(
      Level(
        widths[max(i - 1, 0)],
        width,
        size.depth,
        resample=Downsample(width, asymmetric=True, dtype=dtype, rngs=rngs) if i < last else None,
        **common,
      )
      for i, width in enumerate(widths)
    )
    self.encoder_middle = Middle(widths[-1], attention=size.attention, **common)
    self.encoder_norm = GroupNorm(widths[-1], groups=groups, eps=EPS, rngs=rngs)
    self.encoder_out = new_conv(widths[-1], 2 * latent_channels, 3)
    # Keys are counted (method/network.py): in another order, these parameters would have other initial values.
    self.quant = new_conv(2 * latent_channels, 2 * latent_channels, 1)
    # Training starts with little noise on the latents: noise of unit variance would hide the image from the decoder.
    self.quant.bias = nnx.Param(jnp.repeat(jnp.asarray([0.0, START_LOG_VARIANCE]), latent_channels))

    self.post_quant = new_conv(latent_channels, latent_channels, 1)
    self.decoder_in = new_conv(latent_channels, widths[-1], 3)
    self.decoder_middle = Middle(widths[-1], attention=size.attention, **common)
    self.up = nnx.List(
      Level(
        widths[min(i + 1, last)],
        widths[i],
        size.depth + 1,
        resample=Upsample(widths[i], dtype=dtype, rngs=rngs) if i > 0 else None,
        **common,
      )
      for i in reversed(range(len(widths)))
    )
    self.decoder_norm = GroupNorm(widths[0], groups=groups, eps=EPS, rngs=rngs)
    self.conv_out = new_conv(widths[0], 3 * size.patch**2, 3)
    self.shift = LatentStatistic(jnp.full((latent_channels,), size.shift, jnp.float32))
    self.scale = LatentStatistic(jnp.full((latent_channels,), size.scale, jnp.float32))

  def encode(self, x: Float[Array, "b H W 3"]) -> Posterior:
    """Return the posterior over latents, f32. Log-variances are clipped to [-30, 20] as in Stable Diffusion."""
    # Channels come before patches: each colour's pixels are adjacent, as the decoder unfolds them.
    h = self.conv_in(rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=self.patch, q=self.patch))
    for level in self.down:
      h = level(h)
    h = jax.nn.silu(self.encoder_norm(self.encoder_middle(h)))
    mean, log_variance = jnp.split(self.quant(self.encoder_out(h)).astype(jnp.float32), 2, axis=-1)
    return Posterior(mean=mean, log_variance=jnp.clip(log_variance, -30.0, 20.0))

  def decode(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
    """Return the image of an unscaled latent, f32, not clipped."""
    # Values are not clipped to [-1, 1]: the reconstruction loss needs the gradient outside of it, too.
    h = self.decoder_middle(self.decoder_in(self.post_quant(latent)))
    for level in self.up:
      h = level(h)
    x = self.conv_out(jax.nn.silu(self.decoder_norm(h))).astype(jnp.float32)
    return rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=self.patch, q=self.patch)

  def to_z(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    # The noise schedules assume zero mean and unit variance.
    return (latent - self.shift[...]) * self.scale[...]

  def from_z(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return z / self.scale[...] + self.shift[...]


def sample_posterior(posterior: Posterior, key: jax.Array | None) -> Float[Array, "b h w c"]:
  """Return a sample from the posterior, or its mode if `key` is None."""
  noise = None if key is None else jax.random.normal(key, posterior.mean.shape, jnp.float32)
  return at_noise(posterior, noise)


def at_noise(posterior: Posterior, noise: Float[Array, "b h w c"] | None) -> Float[Array, "b h w c"]:
  """Return the posterior's sample for `noise` from N(0, I), or its mode if that is None."""
  if noise is None:
    return posterior.mean
  return posterior.mean + jnp.exp(0.5 * posterior.log_variance) * noise
