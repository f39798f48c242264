"""Stable Diffusion v1's UNet (UNet2DConditionModel), with the widths, depths and head counts of a config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffdis_jax.config.model import Model
from diffdis_jax.models.layers import GroupNorm, TimestepEmbedder, conv
from diffdis_jax.models.remat import run_block
from diffdis_jax.models.unet_blocks import Downsample, ResnetBlock, SpatialTransformer, Upsample

EPS = 1e-5  # the epsilon of residual blocks and the last norm; attention blocks have 1e-6, as in diffusers

# (index of the attention block, block, image features, text condition, carry) -> (image features, carry).
AttentionFn = Callable[[int, SpatialTransformer, Array, Array, Any], tuple[Array, Any]]


class AttentionOutput(NamedTuple):
  """The result of an attention block: image features, and the carry that the caller hands to the next block."""

  x: Float[Array, "b h w c"]
  carry: Any


def image_only(index: int, block: SpatialTransformer, x: Array, c: Array, carry: Any) -> AttentionOutput:
  """Run an attention block of Stable Diffusion, without a second stream."""
  del index
  return AttentionOutput(block(x, c), carry)


def _call(block: Any, *args: Array) -> Array:
  return block(*args)


class DownLevel(nnx.Module):
  """Residual blocks, each followed by attention if the level has it, and then halving of the resolution."""

  def __init__(self, din: int, dout: int, depth: int, *, attention: bool, downsample: bool, make: BlockMaker):
    widths = [din] + [dout] * depth
    self.resnets = nnx.List(make.resnet(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
    self.attentions = nnx.List(make.attention(dout) for _ in range(depth if attention else 0))
    self.downsample = Downsample(dout, dtype=make.dtype, rngs=make.rngs) if downsample else None


class UpLevel(nnx.Module):
  """A level of the up path: like DownLevel, but with one more block, a skip connection into each residual block, and
  doubling of the resolution."""

  def __init__(self, din: int, dout: int, skips: Sequence[int], *, attention: bool, upsample: bool, make: BlockMaker):
    # Each residual block takes the output of the block before it and one skip.
    widths = [din] + [dout] * len(skips)
    self.resnets = nnx.List(make.resnet(a + skip, dout) for a, skip in zip(widths[:-1], skips, strict=True))
    self.attentions = nnx.List(make.attention(dout) for _ in skips if attention)
    self.upsample = Upsample(dout, dtype=make.dtype, rngs=make.rngs) if upsample else None


class Middle(nnx.Module):
  def __init__(self, width: int, *, make: BlockMaker):
    self.resnet1 = make.resnet(width, width)
    self.attention = make.attention(width)
    self.resnet2 = make.resnet(width, width)


@struct.dataclass
class BlockMaker:
  """The settings that all blocks of one UNet share."""

  num_heads: int
  context_width: int
  groups: int
  time_width: int | None
  dtype: Any
  rngs: nnx.Rngs

  def resnet(self, din: int, dout: int) -> ResnetBlock:
    return ResnetBlock(
      din, dout, time_width=self.time_width, groups=self.groups, eps=EPS, dtype=self.dtype, rngs=self.rngs
    )

  def attention(self, width: int) -> SpatialTransformer:
    return SpatialTransformer(
      width,
      num_heads=self.num_heads,
      context_width=self.context_width,
      groups=self.groups,
      dtype=self.dtype,
      rngs=self.rngs,
    )


@struct.dataclass
class DownOutput:
  """The result of the down path and the middle block: the inputs of the up path, and the carry of attention."""

  h: Float[Array, "b h w c"]
  skips: tuple[Array, ...]
  temb: Float[Array, "b d"]
  carry: Any


class UNet(nnx.Module):
  """Stable Diffusion's UNet, ε = UNet(z_t, t_z, c).

  Args:
    model: the sizes of the UNet, and of the parts that make c and z; `remat` is applied to each block.
    up_path: whether there is a second half, which discrimination alone does not need.
  """

  def __init__(self, model: Model, *, up_path: bool, dtype: DTypeLike, rngs: nnx.Rngs):
    self.remat, size, latent_channels = model.remat, model.unet, model.autoencoder.latent_channels
    widths, depth, attention = size.widths, size.depth, size.attention
    time_width = 4 * widths[0]
    make = BlockMaker(size.num_heads, model.text_encoder.width, size.groups, time_width, dtype, rngs)
    last = len(widths) - 1

    self.conv_in = conv(latent_channels, widths[0], 3, dtype=dtype, rngs=rngs)
    self.time = TimestepEmbedder(widths[0], time_width, dtype=dtype, rngs=rngs)
    self.down = nnx.List(
      DownLevel(widths[max(i - 1, 0)], width, depth, attention=attention[i], downsample=i < last, make=make)
      for i, width in enumerate(widths)
    )
    self.middle = Middle(widths[-1], make=make)

    # Discrimination alone reads the middle; the second half would take memory and never be used.
    if not up_path:
      return
    # The widths of the skips of `down_and_middle`, in its order. The up path takes them from the end.
    skips = [widths[0]]
    for i, width in enumerate(widths):
      skips += [width] * depth + ([width] if i < last else [])
    self.up = nnx.List()
    din = widths[-1]
    for i in reversed(range(len(widths))):
      level_skips = [skips.pop() for _ in range(depth + 1)]
      self.up.append(UpLevel(din, widths[i], level_skips, attention=attention[i], upsample=i > 0, make=make))
      din = widths[i]
    self.norm_out = GroupNorm(widths[0], groups=size.groups, eps=EPS, rngs=rngs)
    self.conv_out = conv(widths[0], latent_channels, 3, dtype=dtype, rngs=rngs)

  @property
  def fused_widths(self) -> list[int]:
    """Return the width of each attention block of the down path and the middle, in the order of use (SD v1: 6 + 1)."""
    blocks = [block for level in self.down for block in level.attentions] + [self.middle.attention]
    return [block.proj_in.out_features for block in blocks]

  def _run(self, f: Callable[..., Any], block: nnx.Module, *args: Any) -> Any:
    return run_block(f, block, *args, remat=self.remat)

  def down_and_middle(
    self,
    x: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    c: Float[Array, "b l d"],
    *,
    attention: AttentionFn = image_only,
    carry: Any = None,
  ) -> DownOutput:
    """Run the first half. `attention` runs each attention block and hands `carry` on to the next."""
    temb = self.time(t)
    h = self.conv_in(x)
    # There is a skip for the first convolution, for each residual block and for each change of resolution.
    skips, index = [h], 0
    for level in self.down:
      for i, block in enumerate(level.resnets):
        h = self._run(_call, block, h, temb)
        if level.attentions:
          # `index` counts the attention blocks of all levels: a second stream has a block for each.
          h, carry = self._run(functools.partial(attention, index), level.attentions[i], h, c, carry)
          index += 1
        skips.append(h)
      if level.downsample is not None:
        h = level.downsample(h)
        skips.append(h)
    h = self._run(_call, self.middle.resnet1, h, temb)
    h, carry = self._run(functools.partial(attention, index), self.middle.attention, h, c, carry)
    h = self._run(_call, self.middle.resnet2, h, temb)
    return DownOutput(h=h, skips=tuple(skips), temb=temb, carry=carry)

  def up_path(self, down: DownOutput, c: Float[Array, "b l d"]) -> Float[Array, "b h w c"]:
    """Run the second half, and return f32."""
    h, skips = down.h, list(down.skips)
    for level in self.up:
      for i, block in enumerate(level.resnets):
        # Take the last skip first, and put its channels after the features, as Stable Diffusion's weights expect.
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._run(_call, block, h, down.temb)
        if level.attentions:
          h = self._run(_call, level.attentions[i], h, c)
      if level.upsample is not None:
        h = level.upsample(h)
    # f32 from here on, since the loss and the sampler compute differences of the output.
    return self.conv_out(jax.nn.silu(self.norm_out(h))).astype(jnp.float32)

  def __call__(
    self, x: Float[Array, "b h w c"], t: Int[Array, "b"], c: Float[Array, "b l d"]
  ) -> Float[Array, "b h w c"]:
    return self.up_path(self.down_and_middle(x, t, c), c)
