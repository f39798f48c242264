"""CLIP, the baseline of the paper's Table 1: a vision transformer beside the text tower."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.errors import UserError
from diffdis_jax.models.layers import LayerNorm, TransformerLayer, conv, linear, run_block
from diffdis_jax.models.lgr import LanguageGuidedHead
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.structs import TextCondition

# Of CLIP's own training images (OpenAI's release): RGB pixels in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(image: UInt8[Array, "b H W 3"] | Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
  """Pixels of 0 to 255, u8 or f32, to zero mean and unit variance, by CLIP's statistics."""
  scale, shift = (jnp.asarray(value, jnp.float32) for value in (PIXEL_STD, PIXEL_MEAN))
  return (image.astype(jnp.float32) / 255.0 - shift) / scale


def resize_positions(positions: Float[Array, "n d"], *, rows: int, columns: int) -> Float[Array, "m d"]:
  """Learned positions of a square grid of patches for another grid, as open_clip's resize_pos_embed has them.

  Bicubic, antialiased where the grid becomes smaller. The first position, the class token's, stays.
  """
  side, width = math.isqrt(len(positions) - 1), positions.shape[-1]
  if (rows, columns) == (side, side):
    return positions
  grid = jax.image.resize(positions[1:].reshape(side, side, width), (rows, columns, width), "bicubic")
  return jnp.concatenate([positions[:1], grid.reshape(rows * columns, width)])


class VisionEncoder(nnx.Module):
  """CLIP's vision tower: image to one vector, the class token's, through a projection.

  Args:
    image_size: side of the square images that the learned positions are of.
    patch: side of a patch; each is one token.
    projection: width of the result.
    remat: a key of layers.REMAT_POLICIES, applied to each layer.

  Raises:
    UserError: patches do not tile the image.
  """

  def __init__(
    self,
    *,
    image_size: int,
    patch: int,
    width: int,
    depth: int,
    num_heads: int,
    mlp_width: int,
    activation: str,
    projection: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    remat: str,
  ):
    if image_size % patch:
      raise UserError(f"patches of {patch} px do not tile an image of {image_size} px; give a multiple of {patch}")
    self.side, self.dtype, self.remat = patch, dtype, remat
    whole = ((0, 0), (0, 0))
    self.patch = conv(3, width, patch, stride=patch, padding=whole, use_bias=False, dtype=dtype, rngs=rngs)
    init = nnx.initializers.normal(width**-0.5)
    self.class_token = nnx.Param(init(rngs.params(), (width,), jnp.float32))
    self.positions = nnx.Param(init(rngs.params(), ((image_size // patch) ** 2 + 1, width), jnp.float32))
    self.pre_norm = LayerNorm(width, rngs=rngs)
    self.layers = nnx.List(
      TransformerLayer(width, num_heads=num_heads, mlp_width=mlp_width, activation=activation, dtype=dtype, rngs=rngs)
      for _ in range(depth)
    )
    self.norm = LayerNorm(width, rngs=rngs)
    self.projection = linear(width, projection, use_bias=False, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b d"]:
    """Embeddings of normalised images, f32, of any length. Images of another size than the positions' get interpolated
    ones.

    Raises:
      UserError: patches do not tile the images.
    """
    height, width = x.shape[1:3]
    if height % self.side or width % self.side:
      raise UserError(
        f"images are {height} x {width} px; patches of {self.side} px do not tile them, so resize and crop them to a"
        f" multiple of {self.side}"
      )
    patches = self.patch(x)
    tokens = rearrange(patches, "b h w d -> b (h w) d")
    positions = resize_positions(self.positions[...], rows=patches.shape[1], columns=patches.shape[2])
    start = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (len(x), 1, tokens.shape[-1]))
    h = self.pre_norm(jnp.concatenate([start, tokens], axis=1) + positions.astype(self.dtype))
    for layer in self.layers:
      h = run_block(lambda layer, h: layer(h), layer, h, remat=self.remat)
    return self.projection(self.norm(h[:, :1]))[:, 0].astype(jnp.float32)


class Clip(nnx.Module):
  """Two towers and CLIP's learnable scale.

  Args:
    text_encoder: with a projection, to the vision tower's width.
    head: of a long-tailed run's second stage.
    temperature: τ at the start.
  """

  def __init__(
    self,
    *,
    text_encoder: TextEncoder,
    vision_encoder: VisionEncoder,
    head: LanguageGuidedHead | None,
    temperature: float,
  ):
    self.text_encoder = text_encoder
    self.vision_encoder = vision_encoder
    self.head: Any = head
    self.logit_scale = nnx.Param(jnp.asarray(math.log(temperature), jnp.float32))

  def encode_image(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b d"]:
    """L2-normalised embeddings, f32.

    Raises:
      UserError: patches do not tile the images.
    """
    query = self.vision_encoder(normalise(image))
    return query * jax.lax.rsqrt(jnp.sum(query**2, axis=-1, keepdims=True) + 1e-12)

  def encode_text(self, tokens: Int[Array, "b l"]) -> TextCondition:
    """The condition, which CLIP has no use for, and the L2-normalised embedding e."""
    return self.text_encoder(tokens)
