"""The dual-stream deep fusion block, the paper's Figure 3: a text token runs beside the image tokens.

Everything here is new with DiffDis. The image stream is Stable Diffusion's SpatialTransformer, borrowed, never changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from diffdis_jax.models.layers import (
  GEGLU,
  Attention,
  LayerNorm,
  TimestepEmbedder,
  attend_with_lse,
  linear,
  pair,
  unpair,
  with_one_more,
)
from diffdis_jax.models.unet_blocks import BasicTransformerBlock, SpatialTransformer


class FusionBlock(nnx.Module):
  """The text token's own parameters at one attention block of width `width`.

  Args:
    query_width: width of the text query e (768 in the paper).
    share_attention: the text token uses the image stream's q, k, v, out (Table 5); otherwise its own.
    modality_ffn: the text token has its own norm and feed-forward network (Table 5); otherwise the image's.
    query_init: scale of FC_in's initial kernel. At 0 the noise of e_t comes in only as far as training finds a use for
      it. Not stated by the paper.
  """

  def __init__(
    self,
    width: int,
    *,
    query_width: int,
    num_heads: int,
    share_attention: bool,
    modality_ffn: bool,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    query_init: float = 1.0,
  ):
    self.fc_in = linear(query_width, width, dtype=dtype, rngs=rngs, init_scale=query_init)
    self.attn = None if share_attention else Attention(width, num_heads=num_heads, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(width, rngs=rngs) if modality_ffn else None
    self.ff = GEGLU(width, dtype=dtype, rngs=rngs) if modality_ffn else None
    self.fc_out = linear(width, query_width, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    image_block: SpatialTransformer,
    x: Float[Array, "b h w c"],
    c: Float[Array, "b l d"],
    h_e: Float[Array, "b d"],
    e_t: Float[Array, "b d"],
    parts: int = 1,
  ) -> tuple[Float[Array, "b h w c"], Float[Array, "b d"]]:
    """Image features and hidden text query h_e, each updated. `e_t` is time-conditioned and added anew here.

    Where `x` has twice as many rows as `h_e`, it is layers.pair(images without a text token, images of h_e, parts): on
    the former this is the image block alone.
    """
    block = image_block.block
    u = self.fc_in(h_e + e_t)[:, None]
    image = image_block.to_tokens(x)

    if len(image) > len(u):
      alone, image = unpair(image, parts)
      alone = alone + block.attn1(block.norm1(alone))
      u, image = self._joint_attention(block, u, image)
      image = pair(alone, image, parts)
    else:
      u, image = self._joint_attention(block, u, image)
    image = block.after_self_attention(image, c)
    # The text token takes no cross-attention.
    norm, ff = (block.norm3, block.ff) if self.ff is None else (self.norm, self.ff)
    u = u + ff(norm(u))

    return image_block.to_image(image, x), self.fc_out(u)[:, 0]

  def _joint_attention(self, block: BasicTransformerBlock, u: Array, image: Array) -> tuple[Array, Array]:
    """Self-attention over [text token, image tokens], added to each stream."""
    text_attn = block.attn1 if self.attn is None else self.attn
    q_u, k_u, v_u = text_attn.project(block.norm1(u))
    q, k, v = block.attn1.project(block.norm1(image))
    # Each over the image tokens, then over the text token too.
    of_image = with_one_more(*attend_with_lse(q, k, v), q, k_u, v_u)
    of_u = with_one_more(*attend_with_lse(q_u, k, v), q_u, k_u, v_u)
    return u + text_attn.output(of_u), image + block.attn1.output(of_image)


class TextStream(nnx.Module):
  """Embedder of t_e and one FusionBlock for each of the UNet's attention blocks on the way down and in the middle.

  Args:
    widths: widths of those attention blocks; empty where fusion is off (Table 4).
  """

  def __init__(
    self,
    widths: Sequence[int],
    *,
    query_width: int,
    num_heads: int,
    share_attention: bool,
    modality_ffn: bool,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    query_init: float = 1.0,
  ):
    # The width of the sinusoid is not stated by the paper; the query's own keeps one number fewer.
    self.embedder = TimestepEmbedder(query_width, query_width, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List(
      FusionBlock(
        width,
        query_width=query_width,
        num_heads=num_heads,
        share_attention=share_attention,
        modality_ffn=modality_ffn,
        query_init=query_init,
        dtype=dtype,
        rngs=rngs,
      )
      for width in widths
    )

  def time_conditioned(self, e_t: Float[Array, "b d"], t_e: Int[Array, "b"]) -> Float[Array, "b d"]:
    """e_t + Embedder(t_e), in the compute dtype."""
    time = self.embedder(t_e)
    return e_t.astype(time.dtype) + time
