"""What a step minimises: from a batch and keys to the two passes' inputs, their losses and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffdis_jax import losses, sharding, tree
from diffdis_jax.diffusion import schedules
from diffdis_jax.models import autoencoder as autoencoders
from diffdis_jax.models import latents
from diffdis_jax.models.diffdis import DiffDis, to_signed
from diffdis_jax.structs import AnyBatch, Batch
from diffdis_jax.tree import Params

# Share of the running latent statistics that each reconstruction step keeps.
STATISTICS_DECAY = 0.98

# name -> (sum, count): sums over samples, microbatches and steps add up, and their ratio is the mean.
Metrics = dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]

LossFn = Callable[[Params, Params, AnyBatch, dict[str, jax.Array]], tuple[Float[Array, ""], tuple[Metrics, Params]]]


def make_loss(config: ConfigDict, graphdef: nnx.GraphDef, abstract: nnx.State) -> LossFn:
  """(trainable, fixed, batch, keys) -> loss, (metrics, new latent statistics), for the config's objectives.

  Raises UserError for an unknown noise schedule or target.
  """
  for process in (config.image_diffusion, config.text_diffusion):
    schedules.make(process.schedule)
  schedules.check_target(config.text_diffusion.target)

  def loss(
    trainable: Params, fixed: Params, batch: AnyBatch, keys: dict[str, jax.Array]
  ) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:
    model = tree.merge(graphdef, abstract, {**fixed, **trainable})
    if "reconstruction" in config.objectives:
      total, metrics, statistics = reconstruction_loss(model, batch, keys, kl_weight=config.loss.kl_weight)
    else:
      total, metrics = diffusion_loss(model, batch, keys, config)
      statistics = {}
    return total, ({"loss": mean_of(total[None]), **metrics}, statistics)

  return loss


def mean_of(per_sample: Float[Array, "b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
  return jnp.sum(per_sample), jnp.asarray(len(per_sample), jnp.float32)


def quarters_of(name: str, per_sample: Float[Array, "b"], t: Int[Array, "b"]) -> Metrics:
  """A loss by the quarter of its timestep, q1 the least noisy: a diffusion loss alone says little."""
  quarters = losses.by_timestep_quarter(jax.lax.stop_gradient(per_sample), t)
  return {f"{name}_q{i + 1}": (quarters.sum[i], quarters.count[i]) for i in range(4)}


def diffusion_loss(
  model: DiffDis, batch: AnyBatch, keys: dict[str, jax.Array], config: ConfigDict
) -> tuple[Float[Array, ""], Metrics]:
  """L = L_IG + λ L_ITA on the same (x, y) (the paper's Algorithm 1), or one of the two."""
  z, z_discrimination = latents.of_batch(model, batch, keys, sample=config.sample_posterior)
  text = latents.text_of_batch(model, batch)
  null = model.encode_text(model.text_encoder.null_tokens(batch.tokens.shape[1]))
  c_null = jnp.broadcast_to(null.c, text.c.shape)

  generation = generation_inputs(z, text.c, c_null, keys, config)
  discrimination = discrimination_inputs(z_discrimination, text.e, c_null, keys, config)
  if len(config.objectives) == 2:
    parts = sharding.batch_parts()
    predicted, query = model.joint(generation.arguments, discrimination.arguments, parts=parts)
  elif "generation" in config.objectives:
    predicted, query = model.generation(**generation.arguments), None
  else:
    predicted, query = None, model.discrimination(**discrimination.arguments)

  total, metrics = jnp.zeros(()), {}
  if predicted is not None:
    loss, parts = generation_loss(predicted, generation)
    total, metrics = total + loss, {**metrics, **parts}
  if query is not None:
    loss, parts = discrimination_loss(
      query, discrimination, e=text.e, logit_scale=model.logit_scale[...], tokens=batch.tokens, config=config
    )
    total, metrics = total + config.loss.ita_weight * loss, {**metrics, **parts}
  return total, metrics


class Inputs(NamedTuple):
  """Arguments of one pass of the network, and what its loss needs besides: the noise, or the rows without an image."""

  arguments: dict[str, jax.Array]
  besides: jax.Array


def generation_inputs(
  z: Float[Array, "b h w c"],
  c: Float[Array, "b l d"],
  c_null: Float[Array, "b l d"],
  keys: dict[str, jax.Array],
  config: ConfigDict,
) -> Inputs:
  """z_t, t_z and c, which is replaced by the null condition for some of the samples."""
  schedule = schedules.make(config.image_diffusion.schedule)
  b = len(z)
  t_z = jax.random.randint(keys["t_z"], (b,), 0, schedule.num_timesteps)
  noise_z = jax.random.normal(keys["noise_z"], z.shape)
  z_t = schedules.add_noise(schedule, z, noise=noise_z, t=t_z)
  dropped = jax.random.bernoulli(keys["drop_condition"], config.loss.condition_dropout, (b, 1, 1))
  return Inputs(dict(z_t=z_t, t_z=t_z, c=jnp.where(dropped, c_null, c)), noise_z)


def generation_loss(prediction: Float[Array, "b h w c"], inputs: Inputs) -> tuple[Float[Array, ""], Metrics]:
  """L_IG = mean ‖ε_z − Φ_u(z_t, t_z, c)‖²."""
  per_sample = losses.denoising(inputs.besides, prediction)
  quarters = quarters_of("loss_generation", per_sample, inputs.arguments["t_z"])
  return per_sample.mean(), {"loss_generation": mean_of(per_sample), **quarters}


def discrimination_inputs(
  z: Float[Array, "b h w c"],
  e: Float[Array, "b d"],
  c_null: Float[Array, "b l d"],
  keys: dict[str, jax.Array],
  config: ConfigDict,
) -> Inputs:
  """e_t, t_e and z, which is zeros for some of the samples.

  The noised query is data, not a path for gradients: a text tower in training learns from e as the target only.
  """
  text = config.text_diffusion
  schedule = schedules.make(text.schedule)
  b = len(z)
  t_e = jax.random.randint(keys["t_e"], (b,), 0, schedule.num_timesteps)
  noise_e = jax.random.normal(keys["noise_e"], e.shape)
  e_t = schedules.add_noise(schedule, jax.lax.stop_gradient(e), noise=noise_e, t=t_e, gamma=text.gamma)
  dropped = jax.random.bernoulli(keys["drop_image"], config.loss.image_dropout, (b,))
  arguments = dict(
    e_t=e_t,
    t_e=t_e,
    z=jnp.where(dropped[:, None, None, None], 0.0, z),
    t_z=jnp.full((b,), config.condition_timestep, jnp.int32),
    c_null=c_null,
  )
  return Inputs(arguments, dropped)


def discrimination_loss(
  prediction: Float[Array, "b d"],
  inputs: Inputs,
  *,
  e: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  tokens: Int[Array, "b l"],
  config: ConfigDict,
) -> tuple[Float[Array, ""], Metrics]:
  """L_ITA: InfoNCE between the denoised text query ê_0 and the batch's text queries e."""
  text, e_t, t_e = config.text_diffusion, inputs.arguments["e_t"], inputs.arguments["t_e"]
  schedule = schedules.make(text.schedule)
  query = schedules.to_data(schedule, e_t, prediction=prediction, target=text.target, t=t_e, gamma=text.gamma)
  result = losses.contrastive(
    query, e, logit_scale, captions=losses.caption_ids(tokens), dropped=inputs.besides, gather=sharding.everywhere
  )
  metrics = {
    "loss_discrimination": mean_of(result.loss[None]),
    "alignment_accuracy": mean_of(result.accuracy[None]),
    "temperature": mean_of(losses.temperature(logit_scale)[None]),
    **quarters_of("loss_discrimination", result.query_to_text, t_e),
  }
  return result.loss, metrics


def reconstruction_loss(
  model: DiffDis, batch: Batch, keys: dict[str, jax.Array], *, kl_weight: float
) -> tuple[Float[Array, ""], Metrics, Params]:
  """L1 + KL of the autoencoder, and its latents' running shift and scale to zero mean and unit variance."""
  x = to_signed(batch.image)
  posterior = model.autoencoder.encode(x)
  latent = autoencoders.sample_posterior(posterior, keys["posterior"])
  result = losses.reconstruction(
    x,
    model.autoencoder.decode(latent),
    mean=posterior.mean,
    log_variance=posterior.log_variance,
    kl_weight=kl_weight,
  )
  metrics = {name: mean_of(value) for name, value in (("loss_l1", result.l1), ("loss_kl", result.kl))}

  latent = jax.lax.stop_gradient(latent)
  keep, shift, scale = STATISTICS_DECAY, model.autoencoder.shift[...], model.autoencoder.scale[...]
  mean, deviation = latent.mean(axis=(0, 1, 2)), latent.std(axis=(0, 1, 2))
  statistics = {
    "autoencoder.shift": keep * shift + (1.0 - keep) * mean,
    "autoencoder.scale": 1.0 / (keep / scale + (1.0 - keep) * jnp.maximum(deviation, 1e-6)),
  }
  return result.loss.mean(), metrics, statistics
