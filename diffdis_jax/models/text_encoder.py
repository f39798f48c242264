"""CLIP's text tower: a causal pre-norm transformer over BPE tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffdis_jax.config.model import TextEncoderSize
from diffdis_jax.models.layers import LayerNorm, TransformerLayer, linear
from diffdis_jax.models.remat import run_block
from diffdis_jax.structs import TextCondition


class TextEncoder(nnx.Module):
  """A text tower from tokens to the text condition c and the text query e.

  c is Stable Diffusion v1's condition: the last hidden states after the final LayerNorm. e is c at the end-of-text
  token, optionally after CLIP's text projection, L2-normalised (the choice of this vector is not stated by the paper).

  Args:
    remat: a key of remat.REMAT_POLICIES, applied to each layer.
  """

  def __init__(self, size: TextEncoderSize, *, remat: str, dtype: DTypeLike, rngs: nnx.Rngs):
    self.bos_id, self.eos_id, self.dtype, self.remat = size.bos_id, size.eos_id, dtype, remat
    self.token_embedding_weight, width, projection = size.token_embedding_weight, size.width, size.projection
    embed = functools.partial(nnx.Embed, size.vocab_size, width, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
    init = nnx.initializers.normal(0.02)
    self.tokens = embed(embedding_init=init)
    self.positions = nnx.Param(0.5 * init(rngs.params(), (size.max_length, width), jnp.float32))
    self.layers = nnx.List(
      TransformerLayer(
        width, num_heads=size.num_heads, mlp_width=size.mlp_width, activation=size.activation, dtype=dtype, rngs=rngs
      )
      for _ in range(size.depth)
    )
    self.norm = LayerNorm(width, rngs=rngs)
    if size.token_embedding_weight:
      self.query_tokens = embed(embedding_init=nnx.initializers.zeros_init())
    self.projection = linear(width, projection, use_bias=False, dtype=dtype, rngs=rngs) if projection else None

  def null_tokens(self, length: int) -> Int[Array, "1 l"]:
    """Return the empty prompt: start of text, end of text, padding (which is the end-of-text token)."""
    return jnp.asarray([[self.bos_id] + [self.eos_id] * (length - 1)], jnp.int32)

  def __call__(self, tokens: Int[Array, "b l"]) -> TextCondition:
    length = tokens.shape[1]
    h = self._rows(self.tokens, tokens) + self.positions[:length].astype(self.dtype)
    # The mask is causal for the whole length, so that padding after the end of the text has no effect on c before it.
    causal = jnp.tril(jnp.ones((length, length), bool))
    for layer in self.layers:
      h = run_block(lambda layer, h: layer(h, mask=causal), layer, h, remat=self.remat)
    return self.with_query(self.norm(h), tokens)

  def _rows(self, table: nnx.Embed, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    # Take the rows before the cast: the table is large.
    return jnp.take(table.embedding[...], tokens, axis=0).astype(self.dtype)

  def with_query(self, c: Float[Array, "b l d"], tokens: Int[Array, "b l"]) -> TextCondition:
    """Return c and the query e that belongs to it."""
    query = self.query(c, tokens)
    return TextCondition(c=c, e=query * jax.lax.rsqrt(jnp.sum(query**2, axis=-1, keepdims=True) + 1e-12))

  def query(self, c: Float[Array, "b l d"], tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
    """Return e before its normalisation, f32."""
    # Padding is also the end-of-text token, so take the first one.
    end = jnp.argmax(tokens == self.eos_id, axis=1)
    query = jnp.take_along_axis(c, end[:, None, None], axis=1)[:, 0]
    if self.token_embedding_weight:
      # Exclude the start token, and the tokens from the end of the text on.
      place = jnp.arange(tokens.shape[1])
      inside = ((place > 0) & (place < end[:, None])).astype(query.dtype)
      total = jnp.einsum("bl,bld->bd", inside, self._rows(self.query_tokens, tokens))
      query = query + self.token_embedding_weight * total / jnp.maximum(inside.sum(axis=1, keepdims=True), 1)
    if self.projection is not None:
      query = self.projection(query)
    return query.astype(jnp.float32)
