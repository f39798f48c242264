"""The losses of a training step and their metrics, a function for each kind of objective.

`diffusion_loss` is the paper's Algorithm 1 (method/algorithms.py); `reconstruction_loss` trains an autoencoder, and
`clip_loss` CLIP, the paper's baseline. `step.LOSSES` maps each objective to its loss.

Each takes (trainable, batch, keys, teacher, *, build, network, run): `build` makes the model from the trainable
parameters, and `teacher` has the parameters of the start if an objective keeps them. Each returns a `result`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Bool, Float, Int, UInt32

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.config.sections import Loss
from diffdis_jax.method import algorithms, encode, losses
from diffdis_jax.method.diffdis import to_signed
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import Keys, StepNoise, sample_noise
from diffdis_jax.models.autoencoder import sample_posterior
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyBatch, Batch, Pairs
from diffdis_jax.training.metrics import Metrics, mean_of

# The decay of the running latent statistics at each step of reconstruction: they average over about 50 steps.
STATISTICS_DECAY = 0.98

Build = Callable[[Params], Any]
# The loss, its metrics and the measured latent statistics, in the form that jax.value_and_grad takes with has_aux.
Result = tuple[Float[Array, ""], tuple[Metrics, Params]]


class Gradient(NamedTuple):
  """The gradient of a loss with respect to the trainable parameters, its metrics, and the new latent statistics."""

  gradient: Params
  metrics: Metrics
  statistics: Params = {}


def result(total: Float[Array, ""], metrics: Metrics, statistics: Params | None = None) -> Result:
  """Return a loss with its metrics, to which the loss itself is added."""
  return total, ({"loss": mean_of(total[None]), **metrics}, statistics or {})


def noise_of(run: Run, keys: Keys, batch: AnyBatch, network: Network) -> StepNoise:
  """Sample the random choices of each row of a batch."""
  return sample_noise(keys, batch, network=network, loss=run.loss, sample_posterior=run.sample_posterior)


def captions_of(section: Loss, tokens: Int[Array, "b l"]) -> UInt32[Array, "b"] | None:
  """Number the captions for `losses.contrastive`; None if equal captions are negatives."""
  return losses.caption_ids(tokens) if section.duplicate_captions == "mask" else None


def diffusion_loss(
  trainable: Params, batch: AnyBatch, keys: Keys, teacher: Params, *, build: Build, network: Network, run: Run
) -> Result:
  """Compute the loss of the paper's Algorithm 1, and its two parts for the log."""
  del teacher
  model, noise = build(trainable), noise_of(run, keys, batch, network)
  captions = captions_of(run.loss, batch.tokens)
  losses_of_rows = algorithms.training_losses(model, batch, noise, network=network, loss=run.loss, captions=captions)
  metrics: Metrics = {}
  # A task for which the run is not trained has no loss and no metrics.
  if losses_of_rows.generation is not None:
    metrics |= generation_metrics(losses_of_rows.generation, noise)
  if losses_of_rows.alignment is not None:
    metrics |= discrimination_metrics(losses_of_rows.alignment, model.logit_scale[...], noise)
  return result(losses_of_rows.total, metrics)


def generation_metrics(per_sample: Float[Array, "b"], noise: StepNoise) -> Metrics:
  """Return L_IG without weights, so that runs with different weights can be compared, and by the quarter of t_z."""
  everything = jnp.ones(len(per_sample), bool)
  return {"loss_generation": mean_of(per_sample), **quarters_of("loss_generation", per_sample, noise.t_z, everything)}


def discrimination_metrics(contrast: losses.Contrastive, logit_scale: Float[Array, ""], noise: StepNoise) -> Metrics:
  """Return L_ITA of the rows with an image, as the mean of both directions, and by the quarter of t_e. Rows whose image
  is dropped for guidance can only guess, and would hide the progress of the others."""
  rows = ~noise.drop_image
  per_pair = jnp.where(rows, 0.5 * (contrast.query_to_text + contrast.text_to_query), 0.0)
  return {
    "loss_discrimination": Average(total=per_pair.sum(), count=rows.sum(dtype=jnp.float32)),
    **alignment(contrast, logit_scale),
    **quarters_of("loss_discrimination", per_pair, noise.t_e, rows),
  }


def clip_loss(
  trainable: Params, batch: Batch, keys: Keys, teacher: Params, *, build: Build, network: Network, run: Run
) -> Result:
  """Compute the `contrastive_loss` of CLIP, which has no noise."""
  del keys, teacher, network
  model = build(trainable)
  pairs = encode.encode_pairs(model, batch)
  return contrastive_loss(pairs, model.logit_scale[...], captions=captions_of(run.loss, batch.tokens))


def contrastive_loss(pairs: Pairs, logit_scale: Float[Array, ""], *, captions: UInt32[Array, "b"] | None) -> Result:
  """Compute CLIP's loss (Radford et al., 2021): InfoNCE of images and texts in both directions, on the whole batch."""
  # Candidates are gathered on every device, since the negatives of a row are the global batch.
  contrast = losses.contrastive(pairs.image, pairs.text, logit_scale, captions=captions, on_rows=sharding.each_own_rows)
  return result(contrast.loss, {"loss_contrastive": mean_of(contrast.loss[None]), **alignment(contrast, logit_scale)})


def reconstruction_loss(
  trainable: Params, batch: Batch, keys: Keys, teacher: Params, *, build: Build, network: Network, run: Run
) -> Result:
  """Compute L1 + KL of the autoencoder, and the running shift and scale that normalise its latents."""
  del network, teacher
  model, x = build(trainable), to_signed(batch.image)
  posterior = model.autoencoder.encode(x)
  latent = sample_posterior(posterior, keys["posterior"])
  parts = losses.reconstruction(
    x,
    model.autoencoder.decode(latent),
    mean=posterior.mean,
    log_variance=posterior.log_variance,
    kl_weight=run.loss.kl_weight,
  )
  # The statistics are measured and not learned, so that they have no gradient.
  latent = jax.lax.stop_gradient(latent)
  keep, shift, scale = STATISTICS_DECAY, model.autoencoder.shift[...], model.autoencoder.scale[...]
  mean, deviation = latent.mean(axis=(0, 1, 2)), latent.std(axis=(0, 1, 2))
  # Average the deviation and not its reciprocal. Equal latents have a deviation of 0.
  statistics = {
    "autoencoder.shift": keep * shift + (1.0 - keep) * mean,
    "autoencoder.scale": 1.0 / (keep / scale + (1.0 - keep) * jnp.maximum(deviation, 1e-6)),
  }
  return result(parts.loss.mean(), {"loss_l1": mean_of(parts.l1), "loss_kl": mean_of(parts.kl)}, statistics)


def alignment(contrast: losses.Contrastive, logit_scale: Float[Array, ""]) -> Metrics:
  """Return the accuracy among the texts of a contrastive batch, and the temperature."""
  temperature = losses.temperature(logit_scale)
  return {"alignment_accuracy": mean_of(contrast.accuracy[None]), "temperature": mean_of(temperature[None])}


def quarters_of(name: str, per_sample: Float[Array, "b"], t: Int[Array, "b"], rows: Bool[Array, "b"]) -> Metrics:
  """Return the loss of these rows by the quarter of the timestep, of which q1 is the least noisy: the mean of a
  diffusion loss says little."""
  quarters = losses.by_timestep_quarter(jax.lax.stop_gradient(per_sample), t, rows)
  return {f"{name}_q{i + 1}": Average(total=quarters.sum[i], count=quarters.count[i]) for i in range(4)}
