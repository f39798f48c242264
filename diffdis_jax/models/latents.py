"""The latents that training starts from: of images, or of an autoencoder's stored posteriors."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffdis_jax.models.autoencoder import sample_posterior
from diffdis_jax.models.diffdis import DiffDis
from diffdis_jax.structs import AnyBatch, LatentBatch, Posterior

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
