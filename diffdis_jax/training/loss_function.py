"""What a step minimises, and what it reports. `diffusion_loss` is the paper's Algorithm 1 (method/algorithms.py);
`reconstruction_loss` trains an autoencoder, and `clip_loss` CLIP, the paper's baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Float, Int, UInt32

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.config.sections import Loss
from diffdis_jax.method import algorithms, encode, losses
from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import Keys, StepNoise, sample_noise
from diffdis_jax.models.autoencoder import sample_posterior
from diffdis_jax.models.clip import Clip
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyBatch, Batch, Pairs
from diffdis_jax.training.metrics import Metrics, mean_of

# Share of the running latent statistics that each reconstruction step keeps: they look back over some 50 steps.
STATISTICS_DECAY = 0.98


class Total(NamedTuple):
  """The loss of a step, its metrics, and the latent statistics that it measured."""

  total: Float[Array, ""]
  metrics: Metrics
  statistics: Params = {}


class Gradient(NamedTuple):
  """The gradient of `Total.total` with respect to the trainable parameters, and the rest of a Total."""

  gradient: Params
  metrics: Metrics
  statistics: Params = {}


ModelLoss = Callable[..., Total]
"""(model, batch, keys, *, network, run, teacher) -> Total."""


def noise_of(run: Run, keys: Keys, batch: AnyBatch, network: Network) -> StepNoise:
  """The random choices of each row of a batch."""
  return sample_noise(keys, batch, network=network, loss=run.loss, sample_posterior=run.sample_posterior)


def captions_of(section: Loss, tokens: Int[Array, "b l"]) -> UInt32[Array, "b"] | None:
  """As `losses.contrastive` takes them."""
  return losses.caption_ids(tokens) if section.duplicate_captions == "mask" else None


def diffusion_loss(model: DiffDis, batch: AnyBatch, keys: Keys, *, network: Network, run: Run, teacher: None) -> Total:
  """The paper's Algorithm 1, and its two losses by themselves for the log."""
  del teacher
  noise = noise_of(run, keys, batch, network)
  captions = captions_of(run.loss, batch.tokens)
  found = algorithms.training_losses(model, batch, noise, network=network, loss=run.loss, captions=captions)
  metrics: Metrics = {}
  # What the run is not trained for has no loss, and leaves no line in the log.
  if found.generation is not None:
    metrics |= generation_metrics(found.generation, noise)
  if found.dispersive is not None:
    metrics["loss_dispersive"] = mean_of(found.dispersive[None])
  if found.alignment is not None:
    metrics |= discrimination_metrics(found.alignment, model.logit_scale[...], noise)
  return Total(found.total, metrics)


def generation_metrics(per_sample: Float[Array, "b"], noise: StepNoise) -> Metrics:
  """L_IG without weights, so that runs with other weights compare; and by the quarter of t_z."""
  return {"loss_generation": mean_of(per_sample), **quarters_of("loss_generation", per_sample, noise.t_z)}


def discrimination_metrics(result: losses.Contrastive, logit_scale: Float[Array, ""], noise: StepNoise) -> Metrics:
  """L_ITA, and by the quarter of t_e; the latter from ê_0 to e, since only that direction has a t_e for each row."""
  return {
    "loss_discrimination": mean_of(result.loss[None]),
    **alignment(result, logit_scale),
    **quarters_of("loss_discrimination", result.query_to_text, noise.t_e),
  }


def clip_loss(model: Clip, batch: Batch, keys: Keys, *, network: Network, run: Run, teacher: None) -> Total:
  """`contrastive_loss` of CLIP, which makes no random choices."""
  del keys, network, teacher
  pairs = encode.encode_pairs(model, batch)
  return contrastive_loss(pairs, model.logit_scale[...], captions=captions_of(run.loss, batch.tokens))


def contrastive_loss(pairs: Pairs, logit_scale: Float[Array, ""], *, captions: UInt32[Array, "b"] | None) -> Total:
  """CLIP's loss (Radford et al., 2021): InfoNCE between images and texts, both ways, over all of the batch."""
  # Whole on every device: the negatives of a row are those of the global batch.
  result = losses.contrastive(pairs.image, pairs.text, logit_scale, captions=captions, on_rows=sharding.each_own_rows)
  return Total(result.loss, {"loss_contrastive": mean_of(result.loss[None]), **alignment(result, logit_scale)})


def reconstruction_loss(
  model: DiffDis, batch: Batch, keys: Keys, *, network: Network, run: Run, teacher: None
) -> Total:
  """L1 + KL of the autoencoder, and its latents' running shift and scale to zero mean and unit variance."""
  del network, teacher
  x = to_signed(batch.image)
  posterior = model.autoencoder.encode(x)
  latent = sample_posterior(posterior, keys["posterior"])
  result = losses.reconstruction(
    x,
    model.autoencoder.decode(latent),
    mean=posterior.mean,
    log_variance=posterior.log_variance,
    kl_weight=run.loss.kl_weight,
  )
  metrics: Metrics = {name: mean_of(value) for name, value in (("loss_l1", result.l1), ("loss_kl", result.kl))}

  # Measured, not learned: the statistics follow the latents and must not pull at them.
  latent = jax.lax.stop_gradient(latent)
  keep, shift, scale = STATISTICS_DECAY, model.autoencoder.shift[...], model.autoencoder.scale[...]
  mean, deviation = latent.mean(axis=(0, 1, 2)), latent.std(axis=(0, 1, 2))
  # Of the deviation, and not of its reciprocal, the mean is taken. Latents that are all alike deviate by 0.
  statistics = {
    "autoencoder.shift": keep * shift + (1.0 - keep) * mean,
    "autoencoder.scale": 1.0 / (keep / scale + (1.0 - keep) * jnp.maximum(deviation, 1e-6)),
  }
  return Total(result.loss.mean(), metrics, statistics)


def alignment(result: losses.Contrastive, logit_scale: Float[Array, ""]) -> Metrics:
  """Accuracy among the texts of a contrastive batch, and the temperature."""
  temperature = losses.temperature(logit_scale)
  return {"alignment_accuracy": mean_of(result.accuracy[None]), "temperature": mean_of(temperature[None])}


def quarters_of(name: str, per_sample: Float[Array, "b"], t: Int[Array, "b"]) -> Metrics:
  """A loss by the quarter of its timestep, q1 the least noisy: a diffusion loss alone says little."""
  quarters = losses.by_timestep_quarter(jax.lax.stop_gradient(per_sample), t)
  return {f"{name}_q{i + 1}": Average(total=quarters.sum[i], count=quarters.count[i]) for i in range(4)}
