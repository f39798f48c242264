"""Find the nearest sentences of images and images of sentences, count votes, and measure how well a sentence tells its
class's images.

Of equal scores the first counts, as in an argmax. Scores are computed on the device, a block of them at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

QUERIES, KEYS = 1024, 16384  # rows and columns of a block


def nearest(
  queries: Float[np.ndarray, "q d"], keys: Float[np.ndarray, "m d"], *, count: int, block: int = KEYS
) -> Int[np.ndarray, "q n"]:
  """Return the places of the `count` keys of the largest inner products with each query, the best first."""
  # Scores of all images with all sentences of Places-LT would not fit: the best of a block meet the best so far.
  count, block = min(count, len(keys)), min(block, len(keys))
  blocks = [_padded(keys, start, block) for start in range(0, len(keys), block)]
  found = []
  for start in range(0, len(queries), QUERIES):
    rows = jnp.asarray(_padded(queries, start, min(QUERIES, len(queries))))
    best = Best(jnp.full((len(rows), count), -jnp.inf), jnp.zeros((len(rows), count), jnp.int32))
    for number, part in enumerate(blocks):
      best = _better(best, rows, part, jnp.int32(number * block), jnp.int32(len(keys)), count=count)
    found.append(np.asarray(best.places))
  return np.concatenate(found)[: len(queries)]


def _padded(x: Float[np.ndarray, "n d"], start: int, size: int) -> Float[np.ndarray, "m d"]:
  """Return `size` rows from `start` on; at the end the last row again, so that all blocks have one shape."""
  return x[np.minimum(np.arange(start, start + size), len(x) - 1)]


class Best(struct.PyTreeNode):
  """The largest scores of each query so far, and whose they are; the best first."""

  scores: Float[Array, "q n"]
  places: Int[Array, "q n"]


@functools.partial(jax.jit, static_argnames="count")
def _better(
  best: Best,
  queries: Float[Array, "q d"],
  keys: Float[Array, "m d"],
  first: Int[Array, ""],
  end: Int[Array, ""],
  *,
  count: int,
) -> Best:
  """Return the best so far and of these keys, whose places begin at `first`; places from `end` on are padding."""
  places = first + jnp.arange(len(keys), dtype=jnp.int32)
  scores = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
  # Padding and NaN must never win; -inf loses even against the initial best, whose place is 0.
  scores = jnp.where((places < end) & ~jnp.isnan(scores), scores, -jnp.inf)
  of_block, which = jax.lax.top_k(scores, min(count, len(keys)))
  # Earlier places stand first, and of equal values top_k takes the first.
  scores, order = jax.lax.top_k(jnp.concatenate([best.scores, of_block], axis=1), count)
  return Best(scores, jnp.take_along_axis(jnp.concatenate([best.places, places[which]], axis=1), order, axis=1))


def vote(classes: Int[np.ndarray, "q n"]) -> Int[np.ndarray, " q"]:
  """Return the most frequent class of each row; of equally frequent ones that which is met first."""
  # argmax takes the first of equal counts, which is the class of the better sentence.
  counts = (classes[:, :, None] == classes[:, None, :]).sum(axis=2)
  return classes[np.arange(len(classes)), counts.argmax(axis=1)]


def linear_loss(
  texts: Float[np.ndarray, "m d"],
  images: Float[np.ndarray, "n d"],
  *,
  text_labels: Int[np.ndarray, " m"],
  image_labels: Int[np.ndarray, " n"],
  logit_scale: float,
) -> Float[np.ndarray, " m"]:
  """Return AnSS: L(m) = −Σ_i y_i log softmax_i(exp(logit_scale) t_m · v_i), y_i = 1 / (images of m's class) for these,
  else 0.

  Every class of a text has an image. A small loss means that a sentence tells its class's images from all others.
  """
  size, on_device = min(QUERIES, len(texts)), jnp.asarray(images)
  found = []
  for start in range(0, len(texts), size):
    rows = np.minimum(np.arange(start, start + size), len(texts) - 1)
    found.append(np.asarray(_linear_loss(texts[rows], on_device, text_labels[rows], image_labels, logit_scale)))
  return np.concatenate(found)[: len(texts)]


@jax.jit
def _linear_loss(
  texts: Float[Array, "m d"],
  images: Float[Array, "n d"],
  text_labels: Int[Array, " m"],
  image_labels: Int[Array, " n"],
  logit_scale: Float[Array, ""],
) -> Float[Array, " m"]:
  scores = jnp.exp(logit_scale) * jnp.matmul(texts, images.T, precision=jax.lax.Precision.HIGHEST)
  own = (text_labels[:, None] == image_labels[None]).astype(jnp.float32)
  return jax.nn.logsumexp(scores, axis=1) - (own * scores).sum(axis=1) / own.sum(axis=1)
