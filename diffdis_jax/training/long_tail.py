"""Long-tailed recognition after VL-LTR (Tian et al., ECCV 2022), the paper's Table 8: what its two stages minimise.

How DiffDis takes the place of VL-LTR's dual encoder is not stated by the paper. Here an image is ê_0 from pure noise at
the last step of the text process, as in the paper's Algorithm 3, and a sentence is its text query e. No noised sentence
goes in at the image's side: it would name the class.

Mixup and CutMix mix a batch with itself backwards, by one random choice a batch, as VL-LTR takes them from timm: rows
of the global batch, whatever the number of devices, where VL-LTR's partners are of one process. All losses are in f32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.method import features
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.losses import unit_norm
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import Keys
from diffdis_jax.models.clip import Clip
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyArray, LabelledBatch, Pairs
from diffdis_jax.training.losses import Build, Result, result
from diffdis_jax.training.metrics import Metrics, mean_of


def class_contrastive_loss(
  trainable: Params, batch: LabelledBatch, keys: Keys, teacher: Params, *, build: Build, network: Network, run: Run
) -> Result:
  """Compute stage 1: L = (1 − β) L_class + β L_distill on images, each with one sentence of its class.

  `teacher` holds the parameters as they were at the start; it sees the same images, noise and sentences.
  """
  model, at_start = build(trainable), build(teacher)
  tokens, section = batch.tokens, run.long_tail
  assert section is not None  # config/run.py
  assert tokens is not None  # data/build.py reads sentences for this objective
  noise = _sample_noise(keys, len(batch.label), network, run.sample_posterior)

  def embed(model: DiffDis | Clip) -> Pairs:
    image = features.image_features(model, batch.image, noise, network=network)
    # VL-LTR compares vectors of length 1; ê_0 and CLIP's image feature have any.
    return Pairs(image=unit_norm(image), text=model.encode_text(tokens).e)

  # By one noise, so that student and teacher differ in their parameters alone.
  pairs, of_teacher = embed(model), embed(at_start)
  scale = model.logit_scale[...]
  contrast, accuracy = class_contrastive(
    pairs.image, pairs.text, scale, labels=batch.label, smoothing=section.label_smoothing
  )
  distilled = distill(
    pairs.image,
    pairs.text,
    scale,
    teacher_image=of_teacher.image,
    teacher_text=of_teacher.text,
    teacher_logit_scale=at_start.logit_scale[...],
  )
  metrics: Metrics = {
    "loss_class_contrastive": mean_of(contrast[None]),
    "loss_distill": mean_of(distilled[None]),
    "class_accuracy": mean_of(accuracy[None]),
    "temperature": mean_of(jnp.exp(scale)[None]),  # without CLIP's limit, which VL-LTR does not have
  }
  return result((1.0 - section.distill_weight) * contrast + section.distill_weight * distilled, metrics)


def head_loss(
  trainable: Params, batch: LabelledBatch, keys: Keys, teacher: Params, *, build: Build, network: Network, run: Run
) -> Result:
  """Compute stage 2: cross-entropy of the visual and of the language branch, added, on mixed images and targets."""
  del teacher
  model: Any = build(trainable)
  images, head, section = batch.image, network.model.head, run.long_tail
  assert head is not None and section is not None  # config/run.py
  mix = draw_mix(
    keys["mix"],
    size=images.shape[1],
    mixup=section.mixup,
    cutmix=section.cutmix,
    cutmix_share=section.cutmix_share,
  )
  target = mix_targets(batch.label, mix, classes=head.classes, smoothing=section.label_smoothing)
  noise = _sample_noise(keys, len(batch.label), network, run.sample_posterior)
  # Pixels are mixed, so that the frozen network has to see each mixture: its features cannot be kept.
  f = features.image_features(model, mix_images(images, mix), noise, network=network)
  logits = model.head(f, model.logit_scale[...])
  visual, language = (optax.softmax_cross_entropy(x, target) for x in (logits.visual, logits.language))
  metrics: Metrics = {"loss_visual": mean_of(visual), "loss_language": mean_of(language)}
  # Unweighted, as in VL-LTR. Shares of 0.2 and 0.8 are the prediction's (lgr.mixed_prediction).
  return result(visual.mean() + language.mean(), metrics)


def _sample_noise(keys: Keys, b: int, network: Network, sample_posterior: bool) -> features.FeatureNoise:
  """Sample the noise of the image side; for CLIP none. The compiler leaves out what a network has no use for."""
  if network.is_clip:
    return features.FeatureNoise()
  noise_e = jax.random.normal(keys["noise_e"], (b, network.model.query_width))
  return features.FeatureNoise(noise_e=noise_e, posterior=keys["posterior"] if sample_posterior else None)


def class_contrastive(
  image: Float[Array, "b d"],
  text: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  *,
  labels: Int[Array, "b"],
  smoothing: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Compute VL-LTR's class-wise contrastive loss: cross-entropy of s_ij = exp(logit_scale) ⟨image_i, text_j⟩, both
  ways, with every pair of one class a positive (Tian et al., 2022; the code's label smoothing).

  Args:
    image, text: L2-normalised.
    logit_scale: not limited, other than in `contrastive`.
    labels: the class of each pair. Row i's target is 1 over all j of its class, divided by their number.
    smoothing: share ε of the target that is spread evenly over all j.

  Returns:
    loss, the mean over both directions; accuracy, the share of images whose nearest text is of their class.
  """
  theirs = sharding.everywhere(labels)

  def direction(anchors: Float[Array, "b d"], candidates: Float[Array, "b d"]) -> tuple[Array, Array]:
    logits = _logits(anchors, candidates, logit_scale)
    same = (labels[:, None] == theirs).astype(jnp.float32)
    # Never 0 / 0: a pair is of its own class. `same` is symmetric, so that one rule serves both directions.
    target = same / same.sum(axis=1, keepdims=True)
    hits = jnp.take_along_axis(same, jnp.argmax(logits, axis=1, keepdims=True), axis=1)[:, 0]
    log_p = jax.nn.log_softmax(logits, axis=1)
    per_row = -((1.0 - smoothing) * (target * log_p).sum(axis=1) + smoothing * log_p.mean(axis=1))
    return per_row.mean(), hits.mean()

  # A zero-shot classifier goes from image to text, and so does the accuracy.
  (image_to_text, accuracy), (text_to_image, _) = direction(image, text), direction(text, image)
  return 0.5 * (image_to_text + text_to_image), accuracy


def distill(
  image: Float[Array, "b d"],
  text: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  *,
  teacher_image: Float[Array, "b d"],
  teacher_text: Float[Array, "b d"],
  teacher_logit_scale: Float[Array, ""],
) -> Float[Array, ""]:
  """Compute VL-LTR's distillation, −Σ_j softmax(teacher)_j log softmax(student)_j on the logits of `class_contrastive`.

  The mean over rows and over both directions. All four are L2-normalised; no gradient goes to the teacher.
  """

  def direction(anchors: Array, candidates: Array, of_teacher: Array, their_candidates: Array) -> Array:
    student = jax.nn.log_softmax(_logits(anchors, candidates, logit_scale), axis=1)
    teacher = jax.nn.softmax(_logits(of_teacher, their_candidates, teacher_logit_scale), axis=1)
    # Cross-entropy rather than KL: they differ by the teacher's entropy, which has no gradient.
    return -(jax.lax.stop_gradient(teacher) * student).sum(axis=1).mean()

  image_to_text = direction(image, text, teacher_image, teacher_text)
  return 0.5 * (image_to_text + direction(text, image, teacher_text, teacher_image))


def _logits(
  anchors: Float[Array, "b d"], candidates: Float[Array, "m d"], logit_scale: Float[Array, ""]
) -> Float[Array, "b m"]:
  # Against the global batch, as VL-LTR gathers its own from all GPUs. Left to itself, a TPU would multiply f32 in bf16,
  # and a GPU in TF32.
  everyone = sharding.everywhere(candidates)
  cosines = jnp.einsum("id,jd->ij", anchors, everyone, precision=jax.lax.Precision.HIGHEST)
  return jnp.exp(logit_scale.astype(jnp.float32)) * cosines


@struct.dataclass
class Mix:
  """The random choice by which a batch is mixed.

  `share` is λ, a row's own part; with CutMix that of the pixels outside of the box. The box holds rows top ... bottom-1
  and columns left ... right-1.
  """

  share: Float[AnyArray, ""]
  is_cutmix: Bool[AnyArray, ""]
  top: Int[AnyArray, ""]
  bottom: Int[AnyArray, ""]
  left: Int[AnyArray, ""]
  right: Int[AnyArray, ""]


def draw_mix(key: PRNGKeyArray, *, size: int, mixup: float, cutmix: float, cutmix_share: float) -> Mix:
  """Sample λ ~ Beta(a, a), a of mixup or of CutMix; and a box of 1 − λ of the area around a uniform pixel, cut to it.

  Args:
    size: side of the images, pixels.
    mixup, cutmix: a of each; 0 leaves it out, and with both 0 nothing is mixed.
    cutmix_share: how often it is CutMix where both are there.
  """
  # Each choice has its key, whichever of them are made.
  which, of_mixup, of_cutmix, row, column = jax.random.split(key, 5)
  if mixup and cutmix:
    is_cutmix = jax.random.bernoulli(which, cutmix_share)
  else:
    is_cutmix = jnp.asarray(bool(cutmix))

  def beta(key: PRNGKeyArray, a: float) -> Float[Array, ""]:
    return jax.random.beta(key, a, a) if a else jnp.ones(())  # Beta(0, 0) is none; with λ = 1 an image stays itself

  share = jnp.where(is_cutmix, beta(of_cutmix, cutmix), beta(of_mixup, mixup))
  centre = jax.random.randint(row, (), 0, size), jax.random.randint(column, (), 0, size)
  return boxed(share, is_cutmix, *centre, size=size)


def boxed(
  share: Float[Array, ""], is_cutmix: Bool[Array, ""], row: Int[Array, ""], column: Int[Array, ""], *, size: int
) -> Mix:
  """Return the mix of λ and a box around this pixel; λ of CutMix is then what the box, cut to the image, leaves."""
  # As timm halves it: sides are even, and the box is a little smaller than 1 − λ asks for.
  half = jnp.floor(size * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
  edges = [jnp.clip(edge, 0, size) for edge in (row - half, row + half, column - half, column + half)]
  top, bottom, left, right = edges
  outside = 1.0 - ((bottom - top) * (right - left)).astype(jnp.float32) / (size * size)
  # timm's correct_lam: targets are mixed as the pixels were.
  return Mix(jnp.where(is_cutmix, outside, share), is_cutmix, top, bottom, left, right)


def mix_images(images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"], mix: Mix) -> Float[Array, "b h w 3"]:
  """Mix each image with that of the row as far from the other end of the batch; f32, of the same range."""
  own = images.astype(jnp.float32)
  other = own[::-1]
  rows, columns = (jnp.arange(side) for side in own.shape[1:3])
  inside = ((rows >= mix.top) & (rows < mix.bottom))[:, None] & ((columns >= mix.left) & (columns < mix.right))
  cut = jnp.where(inside[None, :, :, None], other, own)
  # Both are computed, and one taken: which, is known on the device alone.
  return jnp.where(mix.is_cutmix, cut, mix.share * own + (1.0 - mix.share) * other)


def mix_targets(labels: Int[Array, "b"], mix: Mix, *, classes: int, smoothing: float) -> Float[Array, "b k"]:
  """Return λ of a row's own class and 1 − λ of its partner's, with `smoothing` of each spread over all classes."""
  own = (1.0 - smoothing) * jax.nn.one_hot(labels, classes, dtype=jnp.float32) + smoothing / classes
  return mix.share * own + (1.0 - mix.share) * own[::-1]
