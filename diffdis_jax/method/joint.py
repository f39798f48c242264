"""Both passes as one batch of 2b rows, which is faster than one pass after the other.

The down path and the middle have the same weights in both passes, so that their convolutions and matrix products run on
all rows at once. The results are those of `DiffDis.generation` and `DiffDis.discrimination`, which the tests check.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.fusion import FusionBlock
from diffdis_jax.models.unet import image_only
from diffdis_jax.models.unet_blocks import SpatialTransformer
from diffdis_jax.structs import AnyArray, DiscriminationPass, GenerationPass


@struct.dataclass
class BothPredictions:
  """The predictions ε̂_z of the generation pass, and ê_0 or ε̂_e of the discrimination pass."""

  noise_z: Float[AnyArray, "b h w c"]
  prediction_e: Float[AnyArray, "b d"]


def pair(first: Array, second: Array, parts: int = 1) -> Array:
  """Join two batches [b, ...] into one of 2b rows.

  Rows that are on devices in `parts` parts (parallel/sharding.batch_parts) stay on their device: each part has first
  the rows of the first batch, then those of the second.
  """

  def split(x: Array) -> Array:
    return x.reshape(parts, -1, *x.shape[1:])

  return jnp.concatenate([split(first), split(second)], axis=1).reshape(-1, *first.shape[1:])


def unpair(x: Array, parts: int = 1) -> tuple[Array, Array]:
  """Split a batch that `pair` has joined into the two batches."""
  first, second = jnp.split(x.reshape(parts, -1, *x.shape[1:]), 2, axis=1)
  return first.reshape(-1, *x.shape[1:]), second.reshape(-1, *x.shape[1:])


def both_passes(
  model: DiffDis, generation: GenerationPass, discrimination: DiscriminationPass, *, parts: int = 1
) -> BothPredictions:
  """Compute Φ_u and Φ_θ in one batch. `pair` explains `parts`."""
  # Generation's rows come first everywhere; `unpair` below relies on it.
  x = pair(generation.z_t, discrimination.z, parts)
  t = pair(generation.t_z, discrimination.t_z, parts)
  c = pair(generation.c, discrimination.c_null, parts)
  e_t = model.text_stream.time_conditioned(discrimination.e_t, discrimination.t_e)
  if model.text_stream.blocks:

    def fuse(
      index: int, block: SpatialTransformer, x: Array, c: Array, h_e: Array
    ) -> tuple[Float[Array, "b2 h w c"], Float[Array, "b d"]]:
      return fuse_second_half(model.text_stream.blocks[index], block, x, c, h_e, e_t, parts)

    down = model.unet.down_and_middle(x, t, c, attention=fuse, carry=jnp.zeros_like(e_t))
    h_e = down.carry
  else:
    # Without fusion (Table 4), query and image interact only in the alignment transformer.
    down = model.unet.down_and_middle(x, t, c, attention=image_only)
    h_e = e_t

  def first(x: Array) -> Array:
    return unpair(x, parts)[0]

  # From here the passes differ: discrimination has no up path, so only generation's skips are used.
  skips = tuple(map(first, down.skips))
  up = dataclasses.replace(down, h=first(down.h), skips=skips, temb=first(down.temb), carry=None)
  prediction = model.alignment(h_e, unpair(down.h, parts)[1])
  noise_z = model.unet.up_path(up, generation.c)
  return BothPredictions(noise_z=noise_z, prediction_e=prediction)


def fuse_second_half(
  fusion: FusionBlock,
  image_block: SpatialTransformer,
  x: Float[Array, "b2 h w c"],
  c: Float[Array, "b2 l d"],
  h_e: Float[Array, "b e"],
  e_t: Float[Array, "b e"],
  parts: int,
) -> tuple[Float[Array, "b2 h w c"], Float[Array, "b e"]]:
  """Run `FusionBlock` on the second of the two batches in `x`, which has b2 = 2b rows, and only the image block on the
  first, which has no text token.

  Only self-attention differs between them, so that only it runs on the halves separately.
  """
  block = image_block.block
  u = fusion.fc_in(h_e + e_t)[:, None]
  # GroupNorm and proj_in compute each row alone, so that they run on both halves at once.
  alone, image = unpair(image_block.to_tokens(x), parts)
  alone = alone + block.attn1(block.norm1(alone))
  u, image = fusion.self_attention(block, u, image)
  # Joined again for cross-attention and the feed-forward network, which are most of the block's cost. c has null rows
  # for the second half, so that no caption leaks into it.
  image = block.after_self_attention(pair(alone, image, parts), c)
  u = fusion.feed_forward(block, u)
  return image_block.to_image(image, x), fusion.fc_out(u)[:, 0]
