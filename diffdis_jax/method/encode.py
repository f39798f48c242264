"""What a batch is encoded to before training's equations begin: latents and text conditions, made anew or stored."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.common.params import Params
from diffdis_jax.errors import UserError
from diffdis_jax.method import schedules
from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.draws import StepNoise
from diffdis_jax.method.network import Network
from diffdis_jax.models.autoencoder import at_noise
from diffdis_jax.models.clip import Clip, normalise
from diffdis_jax.structs import AnyArray, AnyBatch, Batch, LatentBatch, Pairs, Posterior, TextCondition

# What decides which posterior an image has.
ENCODER = re.compile(r"autoencoder\.(conv_in|down|encoder\w*|quant)\.")
# What decides which condition a caption has.
TEXT_ENCODER = re.compile(r"text_encoder\.")


@struct.dataclass
class Encoded:
  """What the rows of a batch are encoded to; `z_discrimination` where discrimination has a view of its own."""

  z: Float[AnyArray, "b h w c"]
  z_discrimination: Float[AnyArray, "b h w c"] | None
  text: TextCondition


def encode_images(
  model: DiffDis, batch: AnyBatch, draws: StepNoise
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"] | None]:
  """z, and the discrimination pass's own z where it has a view of its own.

  Args:
    model: its autoencoder's shift and scale apply to stored posteriors too.
    batch: of images, or of posteriors.
    draws: where they have noise for a posterior, z is that draw of it, or else its mode.
  """
  to_z = lambda posterior, noise: model.autoencoder.to_z(at_noise(posterior, noise))
  if isinstance(batch, LatentBatch):
    posterior = Posterior(batch.mean.astype(jnp.float32), batch.log_variance.astype(jnp.float32))
    return to_z(posterior, draws.posterior), None
  z = to_z(model.autoencoder.encode(to_signed(batch.image)), draws.posterior)
  # One encoding for both passes, a third of a step's cost, unless discrimination has a view of its own.
  if batch.discrimination_image is None:
    return z, None
  own = model.autoencoder.encode(to_signed(batch.discrimination_image))
  return z, to_z(own, draws.posterior_discrimination)


def encode_captions(model: DiffDis, batch: AnyBatch) -> TextCondition:
  """c and e of the captions; of a stored c, e is what follows from it."""
  if not isinstance(batch, LatentBatch) or batch.condition is None:
    return model.encode_text(batch.tokens)
  return model.text_encoder.with_query(batch.condition.astype(model.text_encoder.dtype), batch.tokens)


def encode_rows(model: DiffDis, batch: AnyBatch, draws: StepNoise) -> Encoded:
  """z = V(x);  c, e = T(y). No row depends on another."""
  text = encode_captions(model, batch)
  z, own = encode_images(model, batch, draws)
  return Encoded(z=z, z_discrimination=own, text=text)


def null_condition(model: DiffDis, batch: AnyBatch) -> Float[Array, "1 l d"]:
  """c of the empty caption. One row, encoded once for the whole batch: no caption differs from another in it."""
  return model.encode_text(model.text_encoder.null_tokens(batch.tokens.shape[1])).c


def encode_pairs(model: Clip, batch: Batch) -> Pairs:
  """Each image and its caption by CLIP's towers. No row depends on another."""
  return Pairs(image=model.encode_image(batch.image), text=model.encode_text(batch.tokens).e)


@struct.dataclass
class FeatureDraws:
  """What an image's feature is drawn with: of a CLIP nothing.

  `noise_e` is e_T; `posterior` the key of the latents' posterior, None for its mode.
  """

  noise_e: Float[AnyArray, "b e"] | None = None
  posterior: jax.Array | None = None


def image_features(
  model: DiffDis | Clip,
  images: UInt8[Array, "b H W 3"] | Float[Array, "b H W 3"],
  draws: FeatureDraws,
  *,
  network: Network,
) -> Float[Array, "b e"]:
  """What stands for an image beside sentences, f32, of any length: what CLIP's vision tower gives; of DiffDis ê_0 from
  noise, by one evaluation at the last step (Algorithm 3). No text goes in.

  Args:
    images: pixels of 0 to 255.
  """
  if isinstance(model, Clip):
    return model.vision_encoder(normalise(images))
  assert draws.noise_e is not None
  process, b = network.text_process, len(images)
  z = model.encode_image(images, draws.posterior)
  c_null = model.encode_text(model.text_encoder.null_tokens(network.max_length)).c
  t_e = jnp.full((b,), schedules.trailing(1).t[0], jnp.int32)
  prediction = model.discrimination(
    e_t=draws.noise_e,
    t_e=t_e,
    z=z,
    t_z=jnp.full((b,), network.condition_timestep, jnp.int32),
    c_null=jnp.broadcast_to(c_null, (b, *c_null.shape[1:])),
  )
  e_0 = schedules.to_data(
    process.noise, draws.noise_e, prediction=prediction, target=process.target, t=t_e, gamma=process.gamma
  )
  return e_0.astype(jnp.float32)


def text_features(model: DiffDis | Clip, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
  """What stands for a sentence in the language-guided head: of a CLIP what the projection gives, of any length, as in
  VL-LTR; of DiffDis the text query e, whose length is 1 (not stated by the paper)."""
  text = model.encode_text(tokens)
  return model.text_encoder.query(text.c, tokens) if isinstance(model, Clip) else text.e


def fingerprint(params: Params, which: re.Pattern[str] = ENCODER) -> float:
  """A number that tells one encoder from another: the sum of its parameters' mean magnitudes, f32."""
  encoder = {path: value for path, value in sorted(params.items()) if which.match(path)}
  return float(jax.jit(lambda encoder: sum(jnp.mean(jnp.abs(value)) for value in encoder.values()))(encoder))


def check_stored(facts: Mapping[str, Mapping[str, Any]], params: Params, trained: Collection[str]) -> None:
  """Raises UserError where stored latents or text conditions are of other encoders than these, or of one in training.

  Args:
    facts: path -> what the preparation of the latents there wrote of them.
    params: of the network.
    trained: paths of the parameters that training changes.
  """
  for path, fact in facts.items():
    stored = [("latents", "autoencoder", fact["fingerprint"], ENCODER)]
    if "text" in fact:
      if any(TEXT_ENCODER.match(name) for name in trained):
        raise UserError(
          "the text encoder is trained, and stored text conditions would not follow it; freeze it in optim.groups, or"
          " prepare the latents without --text"
        )
      stored.append(("text conditions", "text encoder", fact["text"]["fingerprint"], TEXT_ENCODER))
    for what, encoder, expected, which in stored:
      if not math.isclose(expected, fingerprint(params, which), rel_tol=1e-4):
        raise UserError(
          f"the {what} in {path} were made by another {encoder}; set init_from to the workdir that they were made with"
        )
