"""The features of images and sentences in long-tailed recognition (the paper's Table 8), by DiffDis or CLIP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.method import algorithms, encode, samplers, schedules
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.network import Network
from diffdis_jax.models.clip import Clip, normalise
from diffdis_jax.structs import AnyArray


@struct.dataclass
class FeatureNoise:
  """The random choices for an image's feature. CLIP has none.

  `noise_e` is e_T, and `posterior` the key for sampling the latents' posterior, or None for its mode.
  """

  noise_e: Float[AnyArray, "b e"] | None = None
  posterior: jax.Array | None = None


def image_features(
  model: DiffDis | Clip,
  images: UInt8[Array, "b H W 3"] | Float[Array, "b H W 3"],
  noise: FeatureNoise,
  *,
  network: Network,
) -> Float[Array, "b e"]:
  """Return the images' features, f32, of any length: the output of CLIP's image encoder, or for DiffDis ê_0 by
  Algorithm 3 with one step. No text is an input.

  Args:
    images: pixels of 0 to 255.
  """
  if isinstance(model, Clip):
    return model.vision_encoder(normalise(images))
  assert noise.noise_e is not None
  z = model.encode_image(images, noise.posterior)
  c_null = encode.null_condition(model, network.max_length)
  # Take ê_0 of the single step, since the head uses its length, which Algorithm 3 would normalise.
  (last,) = samplers.ddim_coefficients(network.text_process, schedules.trailing(1)).each()
  step = algorithms.text_query_step(
    model, noise.noise_e, last, z=z, c_null=c_null, network=network, guidance_scale=1.0, normalize_query=False
  )
  return step.x_0.astype(jnp.float32)


def text_features(model: DiffDis | Clip, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
  """Return the sentences' features: the output of CLIP's projection, of any length, as in VL-LTR, or for DiffDis the
  text query e of length 1 (not stated by the paper)."""
  text = model.encode_text(tokens)
  return model.text_encoder.query(text.c, tokens) if isinstance(model, Clip) else text.e
