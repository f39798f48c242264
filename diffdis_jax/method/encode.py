"""The two encoders in the first lines of Algorithm 1, z = V(x) and c, e = T(y), or the two towers of CLIP."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.step_noise import StepNoise
from diffdis_jax.models.autoencoder import at_noise
from diffdis_jax.models.clip import Clip
from diffdis_jax.structs import AnyArray, AnyBatch, Batch, LatentBatch, Pairs, Posterior, TextCondition


@struct.dataclass
class Latents:
  """The clean latents z, and those of the discrimination pass if it has its own view of the images."""

  z: Float[AnyArray, "b h w c"]
  z_discrimination: Float[AnyArray, "b h w c"] | None


@struct.dataclass
class Encoded:
  """The encoded rows of a batch."""

  latents: Latents
  text: TextCondition


def encode_images(model: DiffDis, batch: AnyBatch, noise: StepNoise) -> Latents:
  """Compute V(x).

  Args:
    model: the shift and scale of its autoencoder also apply to stored posteriors.
    batch: a batch of images, or of posteriors.
    noise: if it has noise for a posterior, z is the sample for that noise, or else the posterior's mode.
  """

  def to_z(posterior: Posterior, noise: Float[Array, "b h w c"] | None) -> Float[Array, "b h w c"]:
    return model.autoencoder.to_z(at_noise(posterior, noise))

  if isinstance(batch, LatentBatch):
    # Posteriors are stored in bf16 before shift and scale. They are sampled here, so that each epoch has new latents.
    posterior = Posterior(batch.mean.astype(jnp.float32), batch.log_variance.astype(jnp.float32))
    return Latents(to_z(posterior, noise.posterior), None)
  z = to_z(model.autoencoder.encode(to_signed(batch.image)), noise.posterior)
  # Both passes share one encoding, a third of a step's cost, unless discrimination has its own view.
  if batch.discrimination_image is None:
    return Latents(z, None)
  own = model.autoencoder.encode(to_signed(batch.discrimination_image))
  return Latents(z, to_z(own, noise.posterior_discrimination))


def encode_captions(model: DiffDis, batch: AnyBatch) -> TextCondition:
  """Compute c, e = T(y)."""
  return model.encode_text(batch.tokens)


def encode_rows(model: DiffDis, batch: AnyBatch, noise: StepNoise) -> Encoded:
  """Compute z = V(x) and c, e = T(y). No row depends on another."""
  text = encode_captions(model, batch)
  return Encoded(latents=encode_images(model, batch, noise), text=text)


def null_condition(model: DiffDis, length: int) -> Float[Array, "1 l d"]:
  """Return c of the empty caption, of `length` tokens.

  It has one row, which is encoded once for the whole batch.
  """
  return model.encode_text(model.text_encoder.null_tokens(length)).c


def encode_pairs(model: Clip, batch: Batch) -> Pairs:
  """Encode each image and its caption by CLIP's towers. No row depends on another."""
  return Pairs(image=model.encode_image(batch.image), text=model.encode_text(batch.tokens).e)
