"""VL-LTR's losses (Tian et al., ECCV 2022), all in f32; the paper's Table 8 trains with them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class ClassContrastive:
  """The class-wise contrastive loss, and the accuracy among the texts of a batch."""

  loss: Float[Array, ""]
  accuracy: Float[Array, ""]


def class_contrastive(
  image: Float[Array, "b d"],
  text: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  *,
  labels: Int[Array, "b"],
  smoothing: float,
  gather: Callable[[Array], Array] = lambda x: x,
) -> ClassContrastive:
  """Compute VL-LTR's class-wise contrastive loss: cross-entropy of s_ij = exp(logit_scale) ⟨image_i, text_j⟩, both
  ways, with every pair of one class a positive (Tian et al., 2022; the code's label smoothing).

  Args:
    image, text: L2-normalised.
    logit_scale: not limited, other than in `contrastive`.
    labels: the class of each pair. Row i's target is 1 over all j of its class, divided by their number.
    smoothing: share ε of the target that is spread evenly over all j.
    gather: makes of rows that are split over devices all rows on each (sharding.everywhere).

  Returns:
    loss, the mean over both directions; accuracy, the share of images whose nearest text is of their class.
  """
  theirs = gather(labels)

  def direction(anchors: Float[Array, "b d"], candidates: Float[Array, "b d"]) -> ClassContrastive:
    logits = _logits(anchors, gather(candidates), logit_scale)
    same = (labels[:, None] == theirs).astype(jnp.float32)
    # Never 0 / 0: a pair is of its own class. `same` is symmetric, so that one rule serves both directions.
    target = same / same.sum(axis=1, keepdims=True)
    hits = jnp.take_along_axis(same, jnp.argmax(logits, axis=1, keepdims=True), axis=1)[:, 0]
    log_p = jax.nn.log_softmax(logits, axis=1)
    per_row = -((1.0 - smoothing) * (target * log_p).sum(axis=1) + smoothing * log_p.mean(axis=1))
    return ClassContrastive(loss=per_row.mean(), accuracy=hits.mean())

  image_to_text, text_to_image = direction(image, text), direction(text, image)
  # A zero-shot classifier goes from image to text, and so does the accuracy.
  return ClassContrastive(loss=0.5 * (image_to_text.loss + text_to_image.loss), accuracy=image_to_text.accuracy)


def distill(
  image: Float[Array, "b d"],
  text: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  *,
  teacher_image: Float[Array, "b d"],
  teacher_text: Float[Array, "b d"],
  teacher_logit_scale: Float[Array, ""],
  gather: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, ""]:
  """Compute VL-LTR's distillation, −Σ_j softmax(teacher)_j log softmax(student)_j on the logits of `class_contrastive`.

  The mean over rows and over both directions. All four are L2-normalised; no gradient goes to the teacher.
  """

  def direction(anchors: Array, candidates: Array, of_teacher: Array, their_candidates: Array) -> Array:
    student = jax.nn.log_softmax(_logits(anchors, gather(candidates), logit_scale), axis=1)
    teacher = jax.nn.softmax(_logits(of_teacher, gather(their_candidates), teacher_logit_scale), axis=1)
    # Cross-entropy rather than KL: they differ by the teacher's entropy, which has no gradient.
    return -(jax.lax.stop_gradient(teacher) * student).sum(axis=1).mean()

  image_to_text = direction(image, text, teacher_image, teacher_text)
  return 0.5 * (image_to_text + direction(text, image, teacher_text, teacher_image))


def _logits(
  anchors: Float[Array, "b d"], candidates: Float[Array, "m d"], logit_scale: Float[Array, ""]
) -> Float[Array, "b m"]:
  # Left to itself, a TPU would multiply f32 in bf16, and a GPU in TF32.
  cosines = jnp.einsum("id,jd->ij", anchors, candidates, precision=jax.lax.Precision.HIGHEST)
  return jnp.exp(logit_scale.astype(jnp.float32)) * cosines
