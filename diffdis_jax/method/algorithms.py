"""The paper's Algorithms 1, 2 and 3, in its symbols (docs/method.md): training, generation, discrimination.

`training_losses` is Algorithm 1, `generate` Algorithm 2, `denoise_text_query` Algorithm 3. Optimisations for hardware
are in other files and tested to give the same results: both passes as one batch (joint.py), a batch in microbatches
(training/gradcache.py), rows over devices (parallel/sharding.py), compiled calls of one shape (inference.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt8, UInt32

from diffdis_jax.config.sections import Loss
from diffdis_jax.method import encode, guidance, joint, losses, samplers, schedules
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.encode import Encoded
from diffdis_jax.method.losses import Contrastive
from diffdis_jax.method.network import Network
from diffdis_jax.method.samplers import DdimCoefficients, DdimStep
from diffdis_jax.method.step_noise import StepNoise
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyArray, AnyBatch, DiscriminationPass, GenerationPass


@struct.dataclass
class TrainingLosses:
  """The losses of Algorithm 1, None for a task that the network is not trained for.

  Attributes:
    total: L.
    generation: L_IG of each row, unweighted.
    alignment: L_ITA, and the accuracy of the rows.
  """

  total: Float[AnyArray, ""]
  generation: Float[AnyArray, "b"] | None
  alignment: Contrastive | None


def training_losses(
  model: DiffDis,
  batch: AnyBatch,
  noise: StepNoise,
  *,
  network: Network,
  loss: Loss,
  captions: UInt32[Array, "b"] | None = None,
) -> TrainingLosses:
  """Compute Algorithm 1: L = L_IG + λ L_ITA on the same images and captions (x, y), or one of the two losses.

  Args:
    batch: x, or the autoencoder's posteriors over them, and y.
    noise: the step's random choices: t_z, ε_z, t_e, ε_e, and which rows are masked for guidance.
    loss: the losses' weights, such as λ.
    captions: a number for each caption, for losses.contrastive.
  """
  # z = V(x);  c, e = T(y)
  encoded = encode.encode_rows(model, batch, noise)
  c_null = encode.null_condition(model, batch.tokens.shape[1])
  # Add noise to both, and let the network predict ε_z and e.
  rows = denoise_rows(model, encoded, c_null, noise, network=network)

  # L = L_IG + λ L_ITA. Only here do rows interact: L_ITA compares each ê_0 with the e of all rows on all devices, for
  # any sampled t_e.
  total, alignment = jnp.zeros(()), None
  if rows.loss_generation is not None:
    schedule = schedules.noise_schedule(network.image_process.schedule)
    weighted = losses.weighted_denoising(rows.loss_generation, noise.t_z, schedule, snr_gamma=loss.snr_gamma)
    total = total + weighted.mean()
  if rows.query is not None:
    e, logit_scale = encoded.text.e, model.logit_scale[...]
    alignment = losses.contrastive(
      rows.query, e, logit_scale, captions=captions, dropped=noise.drop_image, on_rows=sharding.each_own_rows
    )
    total = total + loss.ita_weight * alignment.loss
  return TrainingLosses(total=total, generation=rows.loss_generation, alignment=alignment)


@struct.dataclass
class DenoisedRows:
  """L_IG and ê_0 of each row, None for a pass that was not computed."""

  loss_generation: Float[AnyArray, "b"] | None
  query: Float[AnyArray, "b e"] | None


def denoise_rows(
  model: DiffDis,
  encoded: Encoded,
  c_null: Float[Array, "1 l d"],
  noise: StepNoise,
  *,
  network: Network,
  passes: Sequence[str] = (),
) -> DenoisedRows:
  """Compute the part of Algorithm 1 in which no row depends on another, so that GradCache may split the rows.

  Args:
    c_null: c of the empty caption.
    passes: `generation`, `discrimination` or both; by default the network's objectives.
  """
  z, c, e = encoded.latents.z, encoded.text.c, encoded.text.e
  z_clean = z if encoded.latents.z_discrimination is None else encoded.latents.z_discrimination
  c_null = jnp.broadcast_to(c_null, c.shape)
  of_image, of_text = network.image_process, network.text_process

  # Generation. z_t = √ᾱ(t_z) z + √(1 − ᾱ(t_z)) ε_z;  e is masked: its token is absent from this pass.
  z_t = schedules.add_noise(of_image, z, noise=noise.noise_z, t=noise.t_z)
  # Some rows lose their caption, so that the network also learns the unconditional ε_u for guidance.
  c = jnp.where(noise.drop_condition[:, None, None], c_null, c)
  generation = GenerationPass(z_t=z_t, t_z=noise.t_z, c=c)

  # Discrimination. e_t = γ √ᾱ(t_e) e + √(1 − ᾱ(t_e)) ε_e;  c is masked: otherwise it would reveal the right caption.
  # No gradient passes e_t: a text encoder in training learns from e only as the target.
  e_0 = jax.lax.stop_gradient(e)
  e_t = schedules.add_noise(of_text, e_0, noise=noise.noise_e, t=noise.t_e)
  # Some rows lose their image (not stated by the paper), again for guidance.
  z_shown = jnp.where(noise.drop_image[:, None, None, None], 0.0, z_clean)
  # The image is clean, which its timestep shows: 1000 is one beyond the timesteps of generation (Table 7).
  t_z = jnp.full((len(z),), network.condition_timestep, jnp.int32)
  discrimination = DiscriminationPass(e_t=e_t, t_e=noise.t_e, z=z_shown, t_z=t_z, c_null=c_null)

  # ε̂_z = Φ_u(z_t, t_z, c);  ê_0 or ε̂_e = Φ_θ(e_t, t_e, z)
  noise_z = prediction = None
  passes = passes or network.objectives
  if "discrimination" not in passes:
    noise_z = model.generation(**vars(generation))
  elif "generation" not in passes:
    prediction = model.discrimination(**vars(discrimination))
  else:  # both passes as one batch, which is faster and gives the same
    predictions = joint.both_passes(model, generation, discrimination, parts=sharding.batch_parts())
    noise_z, prediction = predictions.noise_z, predictions.prediction_e

  # L_IG = ‖ε_z − ε̂_z‖² of each row; ê_0 follows from the prediction by the text process's target (Table 2).
  loss = None if noise_z is None else losses.denoising(noise.noise_z, noise_z)
  if prediction is None:
    return DenoisedRows(loss_generation=loss, query=None)
  query = schedules.to_data(of_text, e_t, prediction=prediction, t=noise.t_e)
  return DenoisedRows(loss_generation=loss, query=query)


def generate(
  model: DiffDis,
  tokens: Int[Array, "b l"],
  z_T: Float[Array, "b h w c"],
  *,
  network: Network,
  steps: int,
  guidance_scale: float,
) -> UInt8[Array, "b H W 3"]:
  """Compute Algorithm 2: generate images of captions from noise, by DDIM with η = 0 and guidance."""
  # Stable Diffusion's timesteps, so that exported weights give the same images in its pipeline.
  timesteps = samplers.ddim_coefficients(network.image_process, schedules.leading(steps))
  # x = V⁻¹(z_0)
  return model.decode_image(
    denoise_latents(model, tokens, z_T, timesteps, network=network, guidance_scale=guidance_scale)
  )


def denoise_latents(
  model: DiffDis,
  tokens: Int[Array, "b l"],
  z_t: Float[Array, "b h w c"],
  timesteps: DdimCoefficients,
  *,
  network: Network,
  guidance_scale: float,
) -> Float[Array, "b h w c"]:
  """Run Algorithm 2's loop over some or all of its timesteps, and return the next z."""
  # c = T(y), and the null condition of guidance
  c, c_null = model.encode_text(tokens).c, encode.null_condition(model, tokens.shape[1])

  def step(z_t: Float[Array, "b h w c"], now: DdimCoefficients) -> tuple[Float[Array, "b h w c"], None]:
    return generation_step(
      model, z_t, now, c=c, c_null=c_null, network=network, guidance_scale=guidance_scale
    ).x_prev, None

  # A scan, so that the network is compiled once for any number of steps.
  return jax.lax.scan(step, z_t, timesteps)[0]


def generation_step(
  model: DiffDis,
  z_t: Float[Array, "b h w c"],
  now: DdimCoefficients,
  *,
  c: Float[Array, "b l d"],
  c_null: Float[Array, "1 l d"],
  network: Network,
  guidance_scale: float | Float[Array, ""],
) -> DdimStep:
  """Compute one step of Algorithm 2's loop."""
  process = network.image_process

  def predict(z_t: Float[Array, "b h w c"], t_z: Int[Array, "b"], c: Float[Array, "b l d"]) -> Float[Array, "b h w c"]:
    return model.generation(z_t=z_t, t_z=t_z, c=c)

  # ε̂ = ε_u + s (ε_c − ε_u)
  t_z = jnp.full(len(z_t), now.t)
  prediction = guidance.guide(predict, z_t, t_z, condition=c, null=c_null, scale=guidance_scale)
  # ẑ_0 = (z_t − √(1 − ᾱ) ε̂) / √ᾱ;  z_prev = √ᾱ_prev ẑ_0 + √(1 − ᾱ_prev) ε̂
  return samplers.ddim_step(process, now, z_t, prediction)


def denoise_text_query(
  model: DiffDis,
  z: Float[Array, "b h w c"],
  e_T: Float[Array, "k b d"],
  *,
  network: Network,
  steps: int,
  guidance_scale: float,
  normalize_query: bool,
) -> Float[Array, "b d"]:
  """Compute Algorithm 3: denoise the text query ê_0 of each image, L2-normalised. A caption's score is ⟨ê_0, e⟩.

  No caption is an input, noised or not: e_t of the true caption would contain the answer.

  Args:
    z: V(x), clean.
    e_T: k samples of N(0, I), over which ê_0 is averaged (not stated by the paper, which takes one).
    steps: n. One step, the paper's choice (Table 6), is one evaluation of the network at t_e = T - 1.
    guidance_scale, normalize_query: the arguments of `text_query_step`.
  """
  process, c_null = network.text_process, encode.null_condition(model, network.max_length)
  # From t_e = T - 1, where e_t is pure noise, to the data. Stable Diffusion's timesteps would start below T - 1.
  timesteps = samplers.ddim_coefficients(process, schedules.trailing(steps))

  def step(e_t: Float[Array, "b d"], now: DdimCoefficients) -> tuple[Float[Array, "b d"], None]:
    query_step = text_query_step(
      model,
      e_t,
      now,
      z=z,
      c_null=c_null,
      network=network,
      guidance_scale=guidance_scale,
      normalize_query=normalize_query,
    )
    return query_step.x_prev, None

  def from_noise(e_T: Float[Array, "b d"]) -> Float[Array, "b d"]:
    # The process ends at γ ê_0, whose length does not matter.
    gamma_e_0, _ = jax.lax.scan(step, e_T, timesteps)
    return losses.unit_norm(gamma_e_0)

  # Sample after sample, since all at once would take k times the memory.
  return losses.unit_norm(jax.lax.map(from_noise, e_T).mean(axis=0))


def text_query_step(
  model: DiffDis,
  e_t: Float[Array, "b d"],
  now: DdimCoefficients,
  *,
  z: Float[Array, "b h w c"],
  c_null: Float[Array, "1 l d"],
  network: Network,
  guidance_scale: float,
  normalize_query: bool,
) -> DdimStep:
  """Compute one step of Algorithm 3's loop, where x is e.

  Args:
    guidance_scale: s; the null condition is the image z = 0 (not stated by the paper).
    normalize_query: with target `data`, give ê_0 the length 1 of e (not stated by the paper). With target `noise`, ê_0
      follows from e_t and the predicted noise, and is not changed.
  """
  process = network.text_process

  def predict(e_t: Float[Array, "b d"], t_e: Int[Array, "b"], z: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    # As in training, the image is clean, with its own timestep, and there is no caption.
    t_z = jnp.full(t_e.shape, network.condition_timestep, jnp.int32)
    c = jnp.broadcast_to(c_null, (len(e_t), *c_null.shape[1:]))
    return model.discrimination(e_t=e_t, t_e=t_e, z=z, t_z=t_z, c_null=c)

  # ê_0 or ε̂_e = Φ_θ(e_t, t_e, z)
  t_e = jnp.full(len(e_t), now.t)
  prediction = guidance.guide(predict, e_t, t_e, condition=z, null=jnp.zeros_like(z), scale=guidance_scale)
  if normalize_query and process.target == "data":
    # Normalise after guidance, which changes the length.
    prediction = losses.unit_norm(prediction)
  # e_prev = γ √ᾱ_prev ê_0 + √(1 − ᾱ_prev) ε̂_e
  return samplers.ddim_step(process, now, e_t, prediction)
