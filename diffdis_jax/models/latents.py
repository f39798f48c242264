"""What training starts from: latents of images and conditions of captions, made anew or stored."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffdis_jax.models.autoencoder import sample_posterior
from diffdis_jax.models.diffdis import DiffDis
from diffdis_jax.structs import AnyBatch, LatentBatch, Posterior, TextCondition

# What decides which posterior an image has.
ENCODER = re.compile(r"autoencoder\.(conv_in|down|encoder\w*|quant)\.")
# What decides which condition a caption has.
TEXT_ENCODER = re.compile(r"text_encoder\.")
Latents = Float[Array, "b h w c"]


def of_batch(
  model: DiffDis, batch: AnyBatch, keys: Mapping[str, jax.Array], *, sample: bool
) -> tuple[Latents, Latents]:
  """z of the generation pass and of the discrimination pass: the same, unless the latter has a view of its own.

  Args:
    model: its autoencoder's shift and scale apply to stored posteriors too.
    batch: of images, or of posteriors.
    keys: "posterior", and "posterior_discrimination" of a view of its own.
    sample: a draw from the posterior, anew at each step, or else its mode.
  """
  key = keys["posterior"] if sample else None
  if isinstance(batch, LatentBatch):
    posterior = Posterior(batch.mean.astype(jnp.float32), batch.log_variance.astype(jnp.float32))
    z = model.autoencoder.to_z(sample_posterior(posterior, key))
    return z, z
  z = model.encode_image(batch.image, key)
  if batch.discrimination_image is None:
    return z, z
  return z, model.encode_image(batch.discrimination_image, keys["posterior_discrimination"] if sample else None)


def text_of_batch(model: DiffDis, batch: AnyBatch) -> TextCondition:
  """c and e of the captions; of a stored c, e is what follows from it."""
  if not isinstance(batch, LatentBatch) or batch.condition is None:
    return model.encode_text(batch.tokens)
  return model.text_encoder.with_query(batch.condition.astype(model.text_encoder.dtype), batch.tokens)


def fingerprint(params: Mapping[str, Array], which: re.Pattern[str] = ENCODER) -> float:
  """A number that tells one encoder from another: the sum of its parameters' mean magnitudes, f32."""
  encoder = {path: value for path, value in sorted(params.items()) if which.match(path)}
  return float(jax.jit(lambda encoder: sum(jnp.mean(jnp.abs(value)) for value in encoder.values()))(encoder))
