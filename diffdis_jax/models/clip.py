"""CLIP, the baseline of the paper's Table 1: a vision transformer beside the text tower."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.errors import UserError
from diffdis_jax.models.layers import LayerNorm, TransformerLayer, linear
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.structs import TextCondition

# Of CLIP's own training images (OpenAI's release): RGB pixels in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(image: UInt8[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
  """u8 pixels to zero mean and unit variance, by CLIP's statistics."""
  scale, shift = (jnp.asarray(value, jnp.float32) for value in (PIXEL_STD, PIXEL_MEAN))
  return (image.astype(jnp.float32) / 255.0 - shift) / scale


class VisionEncoder(nnx.Module):
  """CLIP's vision tower: image to one vector, the class token's, through a projection.

  Args:
    image_size: side of the square images; the learned positions fit no other.
    patch: side of a patch; each is one token.
    projection: width of the result.

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
  ):
    if image_size % patch:
      raise UserError(f"patches of {patch} px do not tile an image of {image_size} px; give a multiple of {patch}")
    self.image_size, self.dtype = image_size, dtype
    self.patch = nnx.Conv(
      3,
      width,
      (patch, patch),
      strides=patch,
      padding="VALID",
      use_bias=False,
      dtype=dtype,
      param_dtype=jnp.float32,
      rngs=rngs,
    )
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
    """Embeddings of normalised images, f32, of any length.

    Raises:
      UserError: images of another size.
    """
    if x.shape[1:3] != (self.image_size, self.image_size):
      raise UserError(
        f"images are {x.shape[1]} x {x.shape[2]} px; CLIP's learned positions take {self.image_size} x"
        f" {self.image_size}, so resize and crop them to that"
      )
    tokens = rearrange(self.patch(x), "b h w d -> b (h w) d")
    start = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (len(x), 1, tokens.shape[-1]))
    h = self.pre_norm(jnp.concatenate([start, tokens], axis=1) + self.positions[...].astype(self.dtype))
    for layer in self.layers:
      h = layer(h)
    return self.projection(self.norm(h[:, :1]))[:, 0].astype(jnp.float32)


class Clip(nnx.Module):
  """Two towers and CLIP's learnable scale.

  Args:
    text_encoder: with a projection, to the vision tower's width.
  """

  def __init__(self, *, text_encoder: TextEncoder, vision_encoder: VisionEncoder):
    self.text_encoder = text_encoder
    self.vision_encoder = vision_encoder
    self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32))

  def encode_image(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b d"]:
    """L2-normalised embeddings, f32.

    Raises:
      UserError: images of another size than the vision tower's.
    """
    query = self.vision_encoder(normalise(image))
    return query * jax.lax.rsqrt(jnp.sum(query**2, axis=-1, keepdims=True) + 1e-12)

  def encode_text(self, tokens: Int[Array, "b l"]) -> TextCondition:
    """The condition, which CLIP has no use for, and the L2-normalised embedding e."""
    return self.text_encoder(tokens)
