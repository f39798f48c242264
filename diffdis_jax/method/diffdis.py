"""DiffDis, one UNet that generates images from text and aligns images with text."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.method.alignment import AlignmentTransformer
from diffdis_jax.method.fusion import TextStream
from diffdis_jax.models.autoencoder import Autoencoder, sample_posterior
from diffdis_jax.models.lgr import LanguageGuidedHead
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.models.unet import UNet
from diffdis_jax.models.unet_blocks import SpatialTransformer
from diffdis_jax.structs import TextCondition


def to_signed(image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
  """Scale pixels of 0 to 255 to [-1, 1]. They are u8, or f32 if images were mixed."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(x: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
  """Scale [-1, 1] to u8 pixels, clipped and rounded."""
  return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


class DiffDis(nnx.Module):
  """The model, with the parts that a run's objectives need; the others are None (method/network.py)."""

  def __init__(
    self,
    *,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder | None = None,
    unet: UNet | None = None,
    text_stream: TextStream | None = None,
    alignment: AlignmentTransformer | None = None,
    head: LanguageGuidedHead | None = None,
    temperature: float,
  ):
    self.autoencoder = autoencoder
    # Any, since a part may be None: a pass runs only if the objectives need it, and then its parts exist.
    self.text_encoder: Any = text_encoder
    self.unet: Any = unet
    self.text_stream: Any = text_stream
    self.alignment: Any = alignment
    self.head: Any = head
    # CLIP's learnable scale. Not stated by the paper.
    self.logit_scale: Any = None if alignment is None else nnx.Param(jnp.asarray(math.log(temperature), jnp.float32))

  def encode_image(
    self, image: UInt8[Array, "b H W 3"] | Float[Array, "b H W 3"], key: jax.Array | None = None
  ) -> Float[Array, "b h w c"]:
    """Return z: a sample of the posterior, or its mode if `key` is None, shifted and scaled to unit variance."""
    return self.autoencoder.to_z(sample_posterior(self.autoencoder.encode(to_signed(image)), key))

  def decode_image(self, z: Float[Array, "b h w c"]) -> UInt8[Array, "b H W 3"]:
    return to_pixels(self.autoencoder.decode(self.autoencoder.from_z(z)))

  def encode_text(self, tokens: Int[Array, "b l"]) -> TextCondition:
    return self.text_encoder(tokens)

  def generation(
    self, *, z_t: Float[Array, "b h w c"], t_z: Int[Array, "b"], c: Float[Array, "b l d"]
  ) -> Float[Array, "b h w c"]:
    """Compute ε̂_z = Φ_u(z_t, t_z, c). The text query is masked, which means that its token is absent: this is Stable
    Diffusion's UNet."""
    return self.unet.up_path(self.unet.down_and_middle(z_t, t_z, c), c)

  def discrimination(
    self,
    *,
    e_t: Float[Array, "b d"],
    t_e: Int[Array, "b"],
    z: Float[Array, "b h w c"],
    t_z: Int[Array, "b"],
    c_null: Float[Array, "b l m"],
  ) -> Float[Array, "b d"]:
    """Compute ê_0 or ε̂_e = Φ_θ(e_t, t_e, z) by the down path, the middle and the alignment transformer.

    Args:
      e_t: noised text query.
      t_e: its timestep.
      z: clean latents.
      t_z: the image's timestep, 1000 in the paper (Table 7).
      c_null: the condition of the empty prompt, so that no caption leaks.
    """
    # Computed once for the pass: the same time-conditioned e_t is added at every block (Figure 3).
    e_t = self.text_stream.time_conditioned(e_t, t_e)
    if not self.text_stream.blocks:  # without fusion, query and image interact only in the alignment transformer
      return self.alignment(e_t, self.unet.down_and_middle(z, t_z, c_null).h)

    def fuse(
      index: int, block: SpatialTransformer, x: Array, c: Array, h_e: Array
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b d"]]:
      return self.text_stream.blocks[index](block, x, c, h_e, e_t)

    # h_e, the hidden text query, starts at zero and is handed from block to block beside the image.
    down = self.unet.down_and_middle(z, t_z, c_null, attention=fuse, carry=jnp.zeros_like(e_t))
    return self.alignment(down.carry, down.h)
