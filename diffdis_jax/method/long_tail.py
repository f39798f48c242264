"""VL-LTR's equations (Tian et al., ECCV 2022), with which the paper trains on long-tailed sets (its Table 8).

Mixup and CutMix mix a batch with its reverse, with one random choice for the batch, like timm's, which VL-LTR uses.
Here the batch is the global one, for any number of devices; in VL-LTR it is that of a process. Losses are in f32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyArray


def class_contrastive(
  image: Float[Array, "b d"],
  text: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  *,
  labels: Int[Array, "b"],
  smoothing: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Compute VL-LTR's class-wise contrastive loss: the cross-entropy of s_ij = exp(logit_scale) ⟨image_i, text_j⟩ in
  both directions, with all pairs of a class as positives (Tian et al., 2022; label smoothing as in their code).

  Args:
    image, text: L2-normalised.
    logit_scale: not limited, unlike in `contrastive`.
    labels: the class of each pair. Row i's target is uniform over all j of its class.
    smoothing: the share ε of the target that is uniform over all j.

  Returns:
    the loss, as the mean over both directions, and the share of images whose nearest text is of their class.
  """
  theirs = sharding.everywhere(labels)

  def direction(anchors: Float[Array, "b d"], candidates: Float[Array, "b d"]) -> tuple[Array, Array]:
    logits = _logits(anchors, candidates, logit_scale)
    same = (labels[:, None] == theirs).astype(jnp.float32)
    # The sum is at least 1, since a pair is of its own class. `same` is symmetric, so it serves both directions.
    target = same / same.sum(axis=1, keepdims=True)
    hits = jnp.take_along_axis(same, jnp.argmax(logits, axis=1, keepdims=True), axis=1)[:, 0]
    log_p = jax.nn.log_softmax(logits, axis=1)
    per_row = -((1.0 - smoothing) * (target * log_p).sum(axis=1) + smoothing * log_p.mean(axis=1))
    return per_row.mean(), hits.mean()

  # The accuracy is that from image to text, like a zero-shot classifier's.
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

  It is the mean over rows and both directions. All embeddings are L2-normalised. The teacher gets no gradient.
  """

  def direction(anchors: Array, candidates: Array, of_teacher: Array, their_candidates: Array) -> Array:
    student = jax.nn.log_softmax(_logits(anchors, candidates, logit_scale), axis=1)
    teacher = jax.nn.softmax(_logits(of_teacher, their_candidates, teacher_logit_scale), axis=1)
    # Cross-entropy instead of KL: they differ by the teacher's entropy, which has no gradient.
    return -(jax.lax.stop_gradient(teacher) * student).sum(axis=1).mean()

  image_to_text = direction(image, text, teacher_image, teacher_text)
  return 0.5 * (image_to_text + direction(text, image, teacher_text, teacher_image))


def _logits(
  anchors: Float[Array, "b d"], candidates: Float[Array, "m d"], logit_scale: Float[Array, ""]
) -> Float[Array, "b m"]:
  # The candidates are the global batch, as VL-LTR gathers its batch from all GPUs. By default, a TPU would multiply f32
  # in bf16, and a GPU in TF32.
  everyone = sharding.everywhere(candidates)
  cosines = jnp.einsum("id,jd->ij", anchors, everyone, precision=jax.lax.Precision.HIGHEST)
  return jnp.exp(logit_scale.astype(jnp.float32)) * cosines


@struct.dataclass
class Mix:
  """The random choices for mixing a batch.

  `share` is λ, the weight of a row itself, or with CutMix the share of pixels outside of the box. The box has the rows
  top ... bottom-1 and the columns left ... right-1.
  """

  share: Float[AnyArray, ""]
  is_cutmix: Bool[AnyArray, ""]
  top: Int[AnyArray, ""]
  bottom: Int[AnyArray, ""]
  left: Int[AnyArray, ""]
  right: Int[AnyArray, ""]


def draw_mix(key: PRNGKeyArray, *, size: int, mixup: float, cutmix: float, cutmix_share: float) -> Mix:
  """Sample λ ~ Beta(a, a), and a box with the share 1 − λ of the area, clipped to the image, around a uniform pixel.

  Args:
    size: side of the images, pixels.
    mixup, cutmix: their a. 0 leaves one out, and if both are 0, nothing is mixed.
    cutmix_share: the probability of CutMix if both are used.
  """
  # Each choice has its own key, also if others are not made.
  which, of_mixup, of_cutmix, row, column = jax.random.split(key, 5)
  if mixup and cutmix:
    is_cutmix = jax.random.bernoulli(which, cutmix_share)
  else:
    is_cutmix = jnp.asarray(bool(cutmix))

  def beta(key: PRNGKeyArray, a: float) -> Float[Array, ""]:
    return jax.random.beta(key, a, a) if a else jnp.ones(())  # Beta(0, 0) does not exist; λ = 1 changes no image

  share = jnp.where(is_cutmix, beta(of_cutmix, cutmix), beta(of_mixup, mixup))
  centre = jax.random.randint(row, (), 0, size), jax.random.randint(column, (), 0, size)
  return boxed(share, is_cutmix, *centre, size=size)


def boxed(
  share: Float[Array, ""], is_cutmix: Bool[Array, ""], row: Int[Array, ""], column: Int[Array, ""], *, size: int
) -> Mix:
  """Return a mix with λ and a box around this pixel. With CutMix, λ becomes the share that the clipped box leaves."""
  # Halved as in timm: sides are even, so that the box may be a little smaller than the share 1 − λ.
  half = jnp.floor(size * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
  edges = [jnp.clip(edge, 0, size) for edge in (row - half, row + half, column - half, column + half)]
  top, bottom, left, right = edges
  outside = 1.0 - ((bottom - top) * (right - left)).astype(jnp.float32) / (size * size)
  # timm's correct_lam: the shares in the targets are those of the pixels.
  return Mix(jnp.where(is_cutmix, outside, share), is_cutmix, top, bottom, left, right)


def mix_images(images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"], mix: Mix) -> Float[Array, "b h w 3"]:
  """Mix row i with row b - 1 - i, for each i; the result is f32 with the same range."""
  own = images.astype(jnp.float32)
  other = own[::-1]
  rows, columns = (jnp.arange(side) for side in own.shape[1:3])
  inside = ((rows >= mix.top) & (rows < mix.bottom))[:, None] & ((columns >= mix.left) & (columns < mix.right))
  cut = jnp.where(inside[None, :, :, None], other, own)
  # Compute both and select one: only the device knows the choice.
  return jnp.where(mix.is_cutmix, cut, mix.share * own + (1.0 - mix.share) * other)


def mix_targets(labels: Int[Array, "b"], mix: Mix, *, classes: int, smoothing: float) -> Float[Array, "b k"]:
  """Return λ for a row's class and 1 − λ for its partner's, with the share `smoothing` spread over all classes."""
  own = (1.0 - smoothing) * jax.nn.one_hot(labels, classes, dtype=jnp.float32) + smoothing / classes
  return mix.share * own + (1.0 - mix.share) * own[::-1]


def sentence_losses(
  texts: Float[Array, "m d"],
  images: Float[Array, "n d"],
  text_labels: Int[Array, " m"],
  image_labels: Int[Array, " n"],
  logit_scale: Float[Array, ""],
) -> Float[Array, " m"]:
  """Compute AnSS's loss of each sentence m: L(m) = −Σ_i y_i log softmax_i(exp(logit_scale) t_m · v_i), where y is
  uniform over the images of m's class."""
  scores = jnp.exp(logit_scale) * jnp.matmul(texts, images.T, precision=jax.lax.Precision.HIGHEST)
  own = (text_labels[:, None] == image_labels[None]).astype(jnp.float32)
  return jax.nn.logsumexp(scores, axis=1) - (own * scores).sum(axis=1) / own.sum(axis=1)
