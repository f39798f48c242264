"""What a step minimises. `diffusion_loss` is the paper's Algorithm 1; `reconstruction_loss` trains an autoencoder, and
`contrastive_loss` CLIP, the paper's baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Float, Int, UInt32

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.config.sections import Loss
from diffdis_jax.method import encode, joint, losses, schedules
from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.draws import Keys, StepNoise, noised_discrimination, noised_generation, sample_noise
from diffdis_jax.method.network import Network
from diffdis_jax.models.autoencoder import sample_posterior
from diffdis_jax.models.clip import Clip
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyBatch, Batch, Pairs
from diffdis_jax.training.metrics import Metrics, mean_of

# Share of the running latent statistics that each reconstruction step keeps.
STATISTICS_DECAY = 0.98


class Total(NamedTuple):
  """The loss of a step, its metrics, and the latent statistics that it measured."""

  total: Float[Array, ""]
  metrics: Metrics
  statistics: Params = {}


ModelLoss = Callable[..., Total]
"""(model, batch, keys, *, network, run, teacher) -> Total."""


def of_diffusion(model: DiffDis, batch: AnyBatch, keys: Keys, *, network: Network, run: Run, teacher: None) -> Total:
  """Of generation and discrimination."""
  del teacher
  return Total(*diffusion_loss(model, batch, keys, network=network, run=run))


def of_contrastive(model: Clip, batch: Batch, keys: Keys, *, network: Network, run: Run, teacher: None) -> Total:
  """Of CLIP, which makes no random choices."""
  del keys, network, teacher
  pairs = encode.encode_pairs(model, batch)
  return Total(*contrastive_loss(pairs, model.logit_scale[...], captions=captions_of(run.loss, batch.tokens)))


def of_reconstruction(model: DiffDis, batch: Batch, keys: Keys, *, network: Network, run: Run, teacher: None) -> Total:
  """Of an autoencoder."""
  del network, teacher
  return Total(*reconstruction_loss(model, batch, keys, kl_weight=run.loss.kl_weight))


def noise_of(run: Run, keys: Keys, batch: AnyBatch, network: Network) -> StepNoise:
  """The random choices of each row of a batch."""
  return sample_noise(
    keys,
    batch,
    network=network,
    condition_dropout=run.loss.condition_dropout,
    image_dropout=run.loss.image_dropout,
    sample_posterior=run.sample_posterior,
  )


def captions_of(section: Loss, tokens: Int[Array, "b l"]) -> UInt32[Array, "b"] | None:
  """As `losses.contrastive` takes them."""
  return losses.caption_ids(tokens) if section.duplicate_captions == "mask" else None


def diffusion_loss(
  model: DiffDis, batch: AnyBatch, keys: Keys, *, network: Network, run: Run
) -> tuple[Float[Array, ""], Metrics]:
  """The paper's Algorithm 1: L = L_IG + λ L_ITA on the same images and captions (x, y), or one of the two losses."""
  draws = noise_of(run, keys, batch, network)
  encoded = encode.encode_rows(model, batch, draws)
  rows = rows_of(model, encoded, encode.null_condition(model, batch), draws, network=network)

  total, metrics = jnp.zeros(()), {}
  if rows.loss_generation is not None:
    loss, found = generation_loss(rows.loss_generation, draws)
    total, metrics = total + loss, {**metrics, **found}
  if rows.query is not None:
    captions = captions_of(run.loss, batch.tokens)
    loss, found = discrimination_loss(rows.query, encoded.text.e, model.logit_scale[...], draws, captions=captions)
    total, metrics = total + run.loss.ita_weight * loss, {**metrics, **found}
  return total, metrics


class Rows(NamedTuple):
  """What the two passes give of each row: L_IG, and ê_0. None of a pass that was not asked for."""

  loss_generation: Float[Array, "b"] | None
  query: Float[Array, "b e"] | None


def rows_of(
  model: DiffDis,
  encoded: encode.Encoded,
  null: Float[Array, "1 l d"],
  draws: StepNoise,
  *,
  network: Network,
  passes: Sequence[str] = (),
) -> Rows:
  """Algorithm 1 up to where rows meet: no row depends on another.

  Args:
    null: c of the empty caption.
    passes: `generation`, `discrimination` or both; else the network's objectives.
  """
  z, text = encoded.z, encoded.text
  own = z if encoded.z_discrimination is None else encoded.z_discrimination
  c_null = jnp.broadcast_to(null, text.c.shape)
  # t_z, t_e ~ U{0 ... T-1};  mask e for generation, mask c for discrimination
  generation = noised_generation(z, text.c, c_null, draws, process=network.image_process)
  discrimination = noised_discrimination(
    own, text.e, c_null, draws, process=network.text_process, condition_timestep=network.condition_timestep
  )

  # Of two tasks, both passes run as one batch, which costs less and gives the same (method/joint.py).
  # ε̂_z = Φ_u(z_t, t_z, c);  ê_0 or ε̂_e = Φ_θ(e_t, t_e, z)
  noise_z = query = None
  passes = passes or network.objectives
  if "discrimination" not in passes:
    noise_z = model.generation(**vars(generation))
  elif "generation" not in passes:
    query = model.discrimination(**vars(discrimination))
  else:
    noise_z, query = joint.both_passes(model, generation, discrimination, parts=sharding.batch_parts())

  if query is not None:
    process, e_t, t_e = network.text_process, discrimination.e_t, discrimination.t_e
    query = schedules.to_data(process.noise, e_t, prediction=query, target=process.target, t=t_e, gamma=process.gamma)
  return Rows(None if noise_z is None else losses.denoising(draws.noise_z, noise_z), query)


def generation_loss(per_sample: Float[Array, "b"], draws: StepNoise) -> tuple[Float[Array, ""], Metrics]:
  """L_IG = mean ‖ε_z − Φ_u(z_t, t_z, c)‖²."""
  quarters = quarters_of("loss_generation", per_sample, draws.t_z)
  return per_sample.mean(), {"loss_generation": mean_of(per_sample), **quarters}


def discrimination_loss(
  query: Float[Array, "b d"],
  e: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  draws: StepNoise,
  *,
  captions: UInt32[Array, "b"] | None,
) -> tuple[Float[Array, ""], Metrics]:
  """L_ITA: InfoNCE between the denoised text queries ê_0 and the batch's text queries e."""
  result = losses.contrastive(
    query, e, logit_scale, captions=captions, dropped=draws.drop_image, gather=sharding.everywhere
  )
  metrics = {
    "loss_discrimination": mean_of(result.loss[None]),
    **alignment(result, logit_scale),
    **quarters_of("loss_discrimination", result.query_to_text, draws.t_e),
  }
  return result.loss, metrics


def contrastive_loss(
  pairs: Pairs, logit_scale: Float[Array, ""], *, captions: UInt32[Array, "b"] | None
) -> tuple[Float[Array, ""], Metrics]:
  """CLIP's loss (Radford et al., 2021): InfoNCE between images and texts, both ways, over all of the batch."""
  result = losses.contrastive(pairs.image, pairs.text, logit_scale, captions=captions, gather=sharding.everywhere)
  return result.loss, {"loss_contrastive": mean_of(result.loss[None]), **alignment(result, logit_scale)}


def reconstruction_loss(
  model: DiffDis, batch: Batch, keys: Keys, *, kl_weight: float
) -> tuple[Float[Array, ""], Metrics, Params]:
  """L1 + KL of the autoencoder, and its latents' running shift and scale to zero mean and unit variance."""
  x = to_signed(batch.image)
  posterior = model.autoencoder.encode(x)
  latent = sample_posterior(posterior, keys["posterior"])
  result = losses.reconstruction(
    x,
    model.autoencoder.decode(latent),
    mean=posterior.mean,
    log_variance=posterior.log_variance,
    kl_weight=kl_weight,
  )
  metrics: Metrics = {name: mean_of(value) for name, value in (("loss_l1", result.l1), ("loss_kl", result.kl))}

  # Measured, not learned: the statistics follow the latents and must not pull at them.
  latent = jax.lax.stop_gradient(latent)
  keep, shift, scale = STATISTICS_DECAY, model.autoencoder.shift[...], model.autoencoder.scale[...]
  mean, deviation = latent.mean(axis=(0, 1, 2)), latent.std(axis=(0, 1, 2))
  statistics = {
    "autoencoder.shift": keep * shift + (1.0 - keep) * mean,
    "autoencoder.scale": 1.0 / (keep / scale + (1.0 - keep) * jnp.maximum(deviation, 1e-6)),
  }
  return result.loss.mean(), metrics, statistics


def alignment(result: losses.Contrastive, logit_scale: Float[Array, ""]) -> Metrics:
  """How well a contrastive batch is told apart, and how sharply."""
  temperature = losses.temperature(logit_scale)
  return {"alignment_accuracy": mean_of(result.accuracy[None]), "temperature": mean_of(temperature[None])}


def quarters_of(name: str, per_sample: Float[Array, "b"], t: Int[Array, "b"]) -> Metrics:
  """A loss by the quarter of its timestep, q1 the least noisy: a diffusion loss alone says little."""
  quarters = losses.by_timestep_quarter(jax.lax.stop_gradient(per_sample), t)
  return {f"{name}_q{i + 1}": Average(total=quarters.sum[i], count=quarters.count[i]) for i in range(4)}
