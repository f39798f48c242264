"""The alignment transformer, from the fused text query and the middle feature map to the predicted text query."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffdis_jax.config.model import AlignmentSize
from diffdis_jax.models.layers import LayerNorm, TransformerLayer, linear


class AlignmentTransformer(nnx.Module):
  """A transformer over [text token, middle feature map], and a linear predictor on the text token.

  Args:
    size: the transformer's size. That it has no position embedding, but a final LayerNorm and GELU MLPs of ratio 4, is
      not stated by the paper.
    query_width: width of the text query, which is input and output.
    image_width: channels of the middle feature map.
  """

  def __init__(self, size: AlignmentSize, *, query_width: int, image_width: int, dtype: DTypeLike, rngs: nnx.Rngs):
    width, self.spatial_pool = size.width, size.spatial_pool
    self.text_in = linear(query_width, width, dtype=dtype, rngs=rngs)
    self.image_in = linear(image_width, width, dtype=dtype, rngs=rngs)
    self.layers = nnx.List(
      TransformerLayer(width, num_heads=size.num_heads, mlp_width=4 * width, activation="gelu", dtype=dtype, rngs=rngs)
      for _ in range(size.depth)
    )
    self.norm = LayerNorm(width, rngs=rngs)
    self.predictor = linear(width, query_width, dtype=dtype, rngs=rngs)
    if size.spatial_pool:
      self.map_norm = LayerNorm(image_width, rngs=rngs)
      self.map_out = linear(size.spatial_pool**2 * image_width, query_width, dtype=dtype, rngs=rngs)

  def __call__(self, h_e: Float[Array, "b d"], features: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Return ê_0 or ε̂_e, f32."""
    # Each kind of token has its own projection, since h_e and the map differ in width.
    image = self.image_in(rearrange(features, "b h w c -> b (h w) c"))
    h = jnp.concatenate([self.text_in(h_e)[:, None], image], axis=1)
    for layer in self.layers:
      h = layer(h)
    # Only the text token is read out. It has attended to the image.
    query = self.predictor(self.norm(h[:, :1]))[:, 0]
    if self.spatial_pool:
      query = query + self.from_map(features)
    # The loss normalises ê_0 and DDIM divides by √(1 − ᾱ): both need f32, whatever the blocks' dtype.
    return query.astype(jnp.float32)

  def from_map(self, features: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Return the part of the query that depends on the map's layout."""
    image = self.map_norm(rearrange(features, "b h w c -> b (h w) c"))
    height, width = (side // self.spatial_pool for side in features.shape[1:3])
    sizes = dict(i=self.spatial_pool, j=self.spatial_pool, h=height, w=width)
    return self.map_out(reduce(image, "b (i h j w) c -> b (i j c)", "mean", **sizes))
