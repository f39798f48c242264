"""Define a convolutional vision tower for CLIP, to compare encoders (E4). It is not in the paper."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffdis_jax.config.model import VisionEncoderSize
from diffdis_jax.models.clip import Rules, Start, check_tiles, mean_parts
from diffdis_jax.models.layers import GroupNorm, conv, linear
from diffdis_jax.models.remat import run_block
from diffdis_jax.models.unet import EPS, BlockMaker, DownLevel

GROUPS = 8  # groups of each GroupNorm
LEVELS = 3


class ConvolutionalEncoder(nnx.Module):
  """The UNet's down path on patches, without attention and timestep; its last map is averaged and projected.

  Each level has `size.depth` blocks, and twice the channels of the previous level; the last has `size.width`.

  Args:
    remat: key of remat.REMAT_POLICIES, applied to each block.

  Attributes:
    RULES: initial values of the parameters that a transformer lacks.
  """

  RULES: Rules = (
    (r"^vision_encoder\.down\..*\.kernel$", Start("fan_in", 1.0)),
    (r"^vision_encoder\.down\..*\.bias$", Start("constant", 0.0)),
  )

  def __init__(self, size: VisionEncoderSize, *, remat: str, dtype: DTypeLike, rngs: nnx.Rngs):
    self.stride, self.spatial_pool, self.remat = size.stride, size.spatial_pool, remat
    widths = [size.width // 2**i for i in reversed(range(LEVELS))]
    dense = functools.partial(linear, use_bias=False, dtype=dtype, rngs=rngs)
    no_padding = ((0, 0), (0, 0))  # patches tile the image
    self.patch = conv(
      3, widths[0], size.patch, stride=size.patch, padding=no_padding, use_bias=False, dtype=dtype, rngs=rngs
    )
    make = BlockMaker(num_heads=1, context_width=1, groups=GROUPS, time_width=None, dtype=dtype, rngs=rngs)
    self.down = nnx.List(
      DownLevel(widths[max(i - 1, 0)], width, size.depth, attention=False, downsample=i < LEVELS - 1, make=make)
      for i, width in enumerate(widths)
    )
    self.norm = GroupNorm(size.width, groups=GROUPS, eps=EPS, rngs=rngs)
    self.projection = dense(size.width, size.projection)
    if size.spatial_pool:
      self.map_out = dense(size.spatial_pool**2 * size.width, size.projection)

  def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b d"]:
    """Return the embeddings, in f32 and not normalised, of normalised images.

    Raises:
      UserError: the tower's patches and levels do not halve the images evenly.
    """
    check_tiles(x, self.stride)
    h = self.patch(x)
    for level in self.down:
      for block in level.resnets:
        h = run_block(lambda block, h: block(h), block, h, remat=self.remat)
      h = h if level.downsample is None else level.downsample(h)
    h = jax.nn.silu(self.norm(h))
    query = self.projection(h.mean(axis=(1, 2))).astype(jnp.float32)
    return query + self.map_out(mean_parts(h, self.spatial_pool)).astype(jnp.float32) if self.spatial_pool else query
