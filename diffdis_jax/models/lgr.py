"""The language-guided head of VL-LTR (Tian et al., ECCV 2022), which classifies images after long-tailed stage 1."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from diffdis_jax.models.layers import LayerNorm
from diffdis_jax.structs import AnyArray

VISUAL_DEVIATION = 0.02  # the deviation of the initial kernels of the visual branch
_MIN_SQUARE = 1e-24
EXACT = jax.lax.Precision.HIGHEST  # by default, TPUs multiply f32 in bf16 and GPUs in TF32


@struct.dataclass
class ClassLogits:
  """The logits of each image by the two branches."""

  visual: Float[AnyArray, "b k"]
  language: Float[AnyArray, "b k"]


class LanguageGuidedHead(nnx.Module):
  """Two classifiers of an image feature f: an MLP, and attention over the anchor sentences of each class.

  The head is computed in f32, also its products and also in a bf16 program. It has about 6 d² + (4 + s) k d
  parameters.

  Args:
    width: d, the width of f and of a sentence's embedding.
    classes: k, the number of classes.
    anchors: s, the number of sentences of a class. A class with fewer ends in rows of zeros, which get no attention.
  """

  def __init__(self, *, width: int, classes: int, anchors: int, rngs: nnx.Rngs):
    # VL-LTR truncates its normal at ± 2, a hundred deviations, which has no effect.
    init = nnx.initializers.normal(VISUAL_DEVIATION)
    dense = functools.partial(nnx.Linear, param_dtype=jnp.float32, precision=EXACT, rngs=rngs)
    self.fc1: Any = dense(width, 4 * width, kernel_init=init)
    self.fc2: Any = dense(4 * width, classes, kernel_init=init)
    self.query_norm = LayerNorm(width, rngs=rngs)
    self.key_norm = LayerNorm(width, rngs=rngs)
    # Identities, as in VL-LTR: attention starts from the similarity of image and sentence.
    self.q: Any = dense(width, width, kernel_init=_identity, use_bias=False)
    self.k: Any = dense(width, width, kernel_init=_identity, use_bias=False)
    # T_c, which the selection of anchors fills (training/anchors.py).
    self.anchors = nnx.Param(jnp.zeros((classes, anchors, width), jnp.float32))

  def __call__(self, f: Float[Array, "b d"], logit_scale: Float[Array, ""]) -> ClassLogits:
    """Compute V: fc2(relu(fc1(f))), and L: exp(logit_scale) · cos(f, g_c), g_c = softmax(Wq LN(f) · Wk LN(T_c) / √d)
    T_c."""
    f = f.astype(jnp.float32)
    visual = self.fc2(jax.nn.relu(self.fc1(f)))
    sentences = self.anchors[...]
    query, keys = self.q(self.query_norm(f[:, None])[:, 0]), self.k(self.key_norm(sentences))
    scores = jnp.einsum("bd,ksd->bks", query, keys, precision=EXACT) / jnp.sqrt(jnp.float32(f.shape[-1]))
    there = jnp.any(sentences != 0.0, axis=-1)
    weights = jax.nn.softmax(scores, axis=-1, where=there)
    g = jnp.einsum("bks,ksd->bkd", weights, sentences, precision=EXACT)
    cosines = jnp.einsum("bd,bkd->bk", unit(f), unit(g), precision=EXACT)
    return ClassLogits(visual=visual, language=jnp.exp(logit_scale.astype(jnp.float32)) * cosines)


def _identity(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32, **_: Any) -> Float[Array, "d d"]:
  del key
  return jnp.eye(*shape, dtype=dtype)


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """Compute x / ‖x‖₂ over the last axis, which is finite for x = 0."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), _MIN_SQUARE))


def mixed_prediction(logits: Float[Array, "2 b k"], visual_share: float) -> Float[Array, "b k"]:
  """Compute a · softmax(V) + (1 − a) · softmax(L), whose largest class is the prediction (VL-LTR has a = 0.2).

  Args:
    logits: those of the visual branch V, then those of the language branch L.
    visual_share: a.
  """
  visual, language = jax.nn.softmax(logits, axis=-1)
  return visual_share * visual + (1.0 - visual_share) * language
