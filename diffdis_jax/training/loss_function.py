"""What a step minimises, and what it reports. `diffusion_loss` is the paper's Algorithm 1 (method/algorithms.py);
`reconstruction_loss` trains an autoencoder, and `contrastive_loss` CLIP, the paper's baseline. The two stages of
long-tailed recognition are in long_tail.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Float, Int, UInt32

from diffdis_jax.common.params import Params
from diffdis_jax.errors import check_choice, check_number
from diffdis_jax.method import algorithms, encode, losses
from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import Keys, StepNoise, sample_noise
from diffdis_jax.models.autoencoder import sample_posterior
from diffdis_jax.models.clip import Clip
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyBatch, Batch, LabelledBatch, Pairs, TrainingBatch
from diffdis_jax.training import long_tail
from diffdis_jax.training.long_tail import LongTail
from diffdis_jax.training.metrics import Metrics, mean_of

# Share of the running latent statistics that each reconstruction step keeps.
STATISTICS_DECAY = 0.98
DUPLICATE_CAPTIONS = ("mask", "negatives")

LossFn = Callable[..., tuple[Float[Array, ""], tuple[Metrics, Params]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
  """A config's `loss` section, and `sample_posterior`.

  Attributes:
    ita_weight: λ of L = L_IG + λ L_ITA; 1 is not stated by the paper.
    condition_dropout: share of samples whose caption generation does not see, for guidance.
    image_dropout: share of samples whose image discrimination does not see, for guidance.
    kl_weight: of an autoencoder's training.
    sample_posterior: latents are a sample of the autoencoder's posterior, or else its mode.
    duplicate_captions: what pairs with equal captions are to each other in a contrastive batch, one of
      DUPLICATE_CAPTIONS: left out of both softmaxes, or negatives, as in open_clip. Not stated by the paper.
    long_tail: of a long-tailed run alone, its config's `long_tail`.

  Raises:
    UserError: a value out of its range.
  """

  ita_weight: float
  condition_dropout: float
  image_dropout: float
  kl_weight: float
  sample_posterior: bool
  duplicate_captions: str = "mask"
  long_tail: LongTail | None = None

  def __post_init__(self) -> None:
    check_number("ita_weight", self.ita_weight, at_least=0.0)
    check_number("condition_dropout", self.condition_dropout, at_least=0.0, at_most=1.0)
    check_number("image_dropout", self.image_dropout, at_least=0.0, below=1.0)
    check_number("kl_weight", self.kl_weight, at_least=0.0)
    check_choice("duplicate_captions", self.duplicate_captions, DUPLICATE_CAPTIONS)

  def sample_noise(self, keys: Keys, batch: AnyBatch, network: Network) -> StepNoise:
    """The random choices of each row of a batch."""
    return sample_noise(
      keys,
      batch,
      network=network,
      condition_dropout=self.condition_dropout,
      image_dropout=self.image_dropout,
      sample_posterior=self.sample_posterior,
    )

  def captions(self, tokens: Int[Array, "b l"]) -> UInt32[Array, "b"] | None:
    """As `losses.contrastive` takes them."""
    return losses.caption_ids(tokens) if self.duplicate_captions == "mask" else None


def loss_function(network: Network, section: Loss) -> LossFn:
  """(trainable, fixed, batch, keys, teacher) -> loss, (metrics, new latent statistics), for the network's objectives.

  `teacher`, the trainable parameters as they were at the start, is class_contrastive's alone.
  """

  def loss(
    trainable: Params, fixed: Params, batch: TrainingBatch, keys: Keys, teacher: Params | None = None
  ) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:
    model = network.with_params({**fixed, **trainable})
    statistics = {}
    if isinstance(batch, LabelledBatch):
      assert section.long_tail is not None  # training/build.py
      start = network.with_params({**fixed, **teacher}) if teacher else None
      common = dict(network=network, section=section.long_tail, sample_posterior=section.sample_posterior)
      total, metrics = long_tail.stage_loss(model, start, batch, keys, **common)
    elif isinstance(model, Clip):
      assert isinstance(batch, Batch)  # data/build.py refuses latents
      pairs = encode.encode_pairs(model, batch)
      total, metrics = contrastive_loss(pairs, model.logit_scale[...], captions=section.captions(batch.tokens))
    elif "reconstruction" in network.objectives:
      assert isinstance(batch, Batch)
      total, metrics, statistics = reconstruction_loss(model, batch, keys, kl_weight=section.kl_weight)
    else:
      total, metrics = diffusion_loss(model, batch, keys, network=network, section=section)
    return total, ({"loss": mean_of(total[None]), **metrics}, statistics)

  return loss


def diffusion_loss(
  model: DiffDis, batch: AnyBatch, keys: Keys, *, network: Network, section: Loss
) -> tuple[Float[Array, ""], Metrics]:
  """The paper's Algorithm 1, and its two losses by themselves for the log."""
  noise = section.sample_noise(keys, batch, network)
  captions = section.captions(batch.tokens)
  found = algorithms.training_losses(
    model, batch, noise, network=network, ita_weight=section.ita_weight, captions=captions
  )
  metrics: Metrics = {}
  if found.generation is not None:
    metrics |= generation_metrics(found.generation, noise)
  if found.alignment is not None:
    metrics |= discrimination_metrics(found.alignment, model.logit_scale[...], noise)
  return found.total, metrics


def generation_metrics(per_sample: Float[Array, "b"], noise: StepNoise) -> Metrics:
  """L_IG, and by the quarter of t_z."""
  return {"loss_generation": mean_of(per_sample), **quarters_of("loss_generation", per_sample, noise.t_z)}


def discrimination_metrics(result: losses.Contrastive, logit_scale: Float[Array, ""], noise: StepNoise) -> Metrics:
  """L_ITA, and by the quarter of t_e; the latter from ê_0 to e, since only that direction has a t_e for each row."""
  return {
    "loss_discrimination": mean_of(result.loss[None]),
    **alignment(result, logit_scale),
    **quarters_of("loss_discrimination", result.query_to_text, noise.t_e),
  }


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
  """Accuracy among the texts of a contrastive batch, and the temperature."""
  temperature = losses.temperature(logit_scale)
  return {"alignment_accuracy": mean_of(result.accuracy[None]), "temperature": mean_of(temperature[None])}


def quarters_of(name: str, per_sample: Float[Array, "b"], t: Int[Array, "b"]) -> Metrics:
  """A loss by the quarter of its timestep, q1 the least noisy: a diffusion loss alone says little."""
  quarters = losses.by_timestep_quarter(jax.lax.stop_gradient(per_sample), t)
  return {f"{name}_q{i + 1}": Average(total=quarters.sum[i], count=quarters.count[i]) for i in range(4)}
