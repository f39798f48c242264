"""The losses of the two stages of long-tailed recognition, as in VL-LTR (Tian et al., ECCV 2022; the paper's Table 8).

How DiffDis replaces VL-LTR's dual encoder is not stated by the paper. Here the feature of an image is ê_0 from pure
noise at the last timestep, as in the paper's Algorithm 3, and that of a sentence is its text query e. No noised
sentence is an input for the image's feature, since it would reveal the class.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.method import features
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.long_tail import class_contrastive, distill, draw_mix, mix_images, mix_targets
from diffdis_jax.method.losses import unit_norm
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import Keys
from diffdis_jax.models.clip import Clip
from diffdis_jax.structs import LabelledBatch, Pairs
from diffdis_jax.training.losses import Build, Result, result
from diffdis_jax.training.metrics import Metrics, mean_of


def class_contrastive_loss(
  trainable: Params, batch: LabelledBatch, keys: Keys, teacher: Params, *, build: Build, network: Network, run: Run
) -> Result:
  """Compute the loss of stage 1, (1 − β) L_class + β L_distill, on images that each have a sentence of their class.

  `teacher` has the parameters of the start, and gets the same images, noise and sentences.
  """
  model, at_start = build(trainable), build(teacher)
  tokens, section = batch.tokens, run.long_tail
  assert section is not None  # checked in config/run.py
  assert tokens is not None  # data/build.py reads sentences for this objective
  noise = _sample_noise(keys, len(batch.label), network, run.sample_posterior)

  def embed(model: DiffDis | Clip) -> Pairs:
    image = features.image_features(model, batch.image, noise, network=network)
    # VL-LTR compares vectors of length 1; ê_0 and CLIP's image feature have any length.
    return Pairs(image=unit_norm(image), text=model.encode_text(tokens).e)

  # With the same noise, so that student and teacher differ only in their parameters.
  pairs, teacher_pairs = embed(model), embed(at_start)
  scale = model.logit_scale[...]
  contrast, accuracy = class_contrastive(
    pairs.image, pairs.text, scale, labels=batch.label, smoothing=section.label_smoothing
  )
  distilled = distill(
    pairs.image,
    pairs.text,
    scale,
    teacher_image=teacher_pairs.image,
    teacher_text=teacher_pairs.text,
    teacher_logit_scale=at_start.logit_scale[...],
  )
  metrics: Metrics = {
    "loss_class_contrastive": mean_of(contrast[None]),
    "loss_distill": mean_of(distilled[None]),
    "class_accuracy": mean_of(accuracy[None]),
    "temperature": mean_of(jnp.exp(scale)[None]),  # VL-LTR does not have CLIP's limit
  }
  return result((1.0 - section.distill_weight) * contrast + section.distill_weight * distilled, metrics)


def head_loss(
  trainable: Params, batch: LabelledBatch, keys: Keys, teacher: Params, *, build: Build, network: Network, run: Run
) -> Result:
  """Compute the loss of stage 2: the cross-entropies of the two branches, added, on mixed images and targets."""
  del teacher
  model: Any = build(trainable)
  images, head, section = batch.image, network.model.head, run.long_tail
  assert head is not None and section is not None  # checked in config/run.py
  mix = draw_mix(
    keys["mix"],
    size=images.shape[1],
    mixup=section.mixup,
    cutmix=section.cutmix,
    cutmix_share=section.cutmix_share,
  )
  target = mix_targets(batch.label, mix, classes=head.classes, smoothing=section.label_smoothing)
  noise = _sample_noise(keys, len(batch.label), network, run.sample_posterior)
  # Pixels are mixed, so that the features of the frozen network must be computed for each mixture.
  f = features.image_features(model, mix_images(images, mix), noise, network=network)
  logits = model.head(f, model.logit_scale[...])
  visual, language = (optax.softmax_cross_entropy(x, target) for x in (logits.visual, logits.language))
  metrics: Metrics = {"loss_visual": mean_of(visual), "loss_language": mean_of(language)}
  # Unweighted, as in VL-LTR; the weights 0.2 and 0.8 are only for predictions (lgr.mixed_prediction).
  return result(visual.mean() + language.mean(), metrics)


def _sample_noise(keys: Keys, b: int, network: Network, sample_posterior: bool) -> features.FeatureNoise:
  """Sample the noise for images; CLIP has none. The compiler removes noise that a network does not use."""
  if network.is_clip:
    return features.FeatureNoise()
  noise_e = jax.random.normal(keys["noise_e"], (b, network.model.query_width))
  return features.FeatureNoise(noise_e=noise_e, posterior=keys["posterior"] if sample_posterior else None)
