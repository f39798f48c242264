"""The dual-stream deep fusion block of the paper's Figure 3, in which a text token runs beside the image tokens.

The parameters here are new in DiffDis. The image stream is Stable Diffusion's SpatialTransformer, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffdis_jax.config.model import Model
from diffdis_jax.models.attention import attend_together
from diffdis_jax.models.layers import GEGLU, Attention, LayerNorm, TimestepEmbedder, linear
from diffdis_jax.models.unet_blocks import BasicTransformerBlock, SpatialTransformer


class FusionBlock(nnx.Module):
  """The text token's own parameters at one attention block of width `width`.

  With `model.share_attention` it uses the image stream's q, k, v and out, and with `model.modality_ffn` it has its own
  norm and feed-forward network (Table 5). If `model.query_init` is 0, e_t and its noise have no effect before
  training.
  """

  def __init__(self, width: int, model: Model, *, dtype: DTypeLike, rngs: nnx.Rngs):
    own_attention, num_heads = not model.share_attention, model.unet.num_heads
    self.fc_in = linear(model.query_width, width, dtype=dtype, rngs=rngs, init_scale=model.query_init)
    self.attn = Attention(width, num_heads=num_heads, dtype=dtype, rngs=rngs) if own_attention else None
    self.norm = LayerNorm(width, rngs=rngs) if model.modality_ffn else None
    self.ff = GEGLU(width, dtype=dtype, rngs=rngs) if model.modality_ffn else None
    self.fc_out = linear(width, model.query_width, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    image_block: SpatialTransformer,
    x: Float[Array, "b h w c"],
    c: Float[Array, "b l d"],
    h_e: Float[Array, "b e"],
    e_t: Float[Array, "b e"],
  ) -> tuple[Float[Array, "b h w c"], Float[Array, "b e"]]:
    """Return the updated image features and hidden text query h_e. `e_t` is time-conditioned, and added to h_e."""
    block = image_block.block
    # 1. Make the text token; 2. self-attention over both streams; 3. each stream alone; 4. back to the query's width.
    u = self.fc_in(h_e + e_t)[:, None]
    # The GroupNorm before proj_in normalises only image tokens, so that the text token does not change its output.
    image = image_block.to_tokens(x)

    u, image = self.self_attention(block, u, image)
    # Cross-attention to c, and the image's feed-forward network. The text token has no cross-attention.
    image = block.after_self_attention(image, c)
    u = self.feed_forward(block, u)

    return image_block.to_image(image, x), self.fc_out(u).squeeze(1)

  def self_attention(
    self, block: BasicTransformerBlock, u: Float[Array, "b 1 c"], image: Float[Array, "b n c"]
  ) -> tuple[Float[Array, "b 1 c"], Float[Array, "b n c"]]:
    """Compute self-attention over [text token, image tokens], and add its parts to the two streams."""
    # By default it uses the image's weights (Table 5), so that the text token starts with pretrained attention.
    text_attn = block.attn1 if self.attn is None else self.attn
    of_u, of_image = attend_together(
      text_attn.project(block.norm1(u)),
      block.attn1.project(block.norm1(image)),
    )
    return u + text_attn.output(of_u), image + block.attn1.output(of_image)

  def feed_forward(self, block: BasicTransformerBlock, u: Float[Array, "b 1 c"]) -> Float[Array, "b 1 c"]:
    """Apply the text token's own feed-forward network, or the image's (Table 5)."""
    norm = block.norm3 if self.norm is None else self.norm
    ff = block.ff if self.ff is None else self.ff
    return u + ff(norm(u))


class TextStream(nnx.Module):
  """The text token's path: the embedder of t_e, and a FusionBlock for each attention block of the UNet's down path and
  middle.

  Args:
    widths: the widths of these attention blocks; none if fusion is off (Table 4).
  """

  def __init__(self, widths: Sequence[int], model: Model, *, dtype: DTypeLike, rngs: nnx.Rngs):
    # The width of the sinusoidal embedding is not stated by the paper; here it is the query's.
    self.embedder = TimestepEmbedder(model.query_width, model.query_width, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List(FusionBlock(width, model, dtype=dtype, rngs=rngs) for width in widths)

  def time_conditioned(self, e_t: Float[Array, "b d"], t_e: Int[Array, "b"]) -> Float[Array, "b d"]:
    """Compute e_t + Embedder(t_e) in the compute dtype."""
    time = self.embedder(t_e)
    return e_t.astype(time.dtype) + time
