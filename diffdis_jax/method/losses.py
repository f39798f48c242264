"""The losses of the paper, L_IG and L_ITA, and of the autoencoder, in f32. They give a number for each sample, of which
the step takes the mean. `contrastive` takes the means itself, since its two directions have different anchors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Integer, UInt32

from diffdis_jax.config.model import MAX_TEMPERATURE
from diffdis_jax.config.sections import NUM_TIMESTEPS
from diffdis_jax.method import schedules
from diffdis_jax.method.schedules import Schedule

MAX_LOGIT_SCALE = float(np.log(MAX_TEMPERATURE))
_MIN_SQUARE = 1e-24
_LOGITS = 2**22  # the most contrastive logits that exist at a time on a device
_HASH_MULTIPLIER = 2654435761  # odd, near 2^32 over the golden ratio


@struct.dataclass
class Contrastive:
  """The result of `contrastive`. In a direction, a row that is no anchor has 0."""

  loss: Float[Array, ""]
  query_to_text: Float[Array, "b"]
  text_to_query: Float[Array, "b"]
  accuracy: Float[Array, ""]


@struct.dataclass
class Direction:
  """One direction of `contrastive`: each anchor's loss, and whether its own candidate is the nearest."""

  loss: Float[Array, "*b"]
  is_nearest: Bool[Array, "*b"]


@struct.dataclass
class Reconstruction:
  """The result of `reconstruction`: loss = l1 + kl_weight · kl."""

  loss: Float[Array, "b"]
  l1: Float[Array, "b"]
  kl: Float[Array, "b"]


class Quarters(NamedTuple):
  """Sums and counts of samples by quarter of the timesteps. They can be added up over hosts and steps."""

  sum: Float[Array, "4"]
  count: Float[Array, "4"]


def _sample_mean(x: Float[Array, "b ..."]) -> Float[Array, "b"]:
  return x.mean(axis=tuple(range(1, x.ndim)))


def denoising(noise: Float[Array, "b ..."], prediction: Float[Array, "b ..."]) -> Float[Array, "b"]:
  """Compute L_IG, mean ‖ε − ε̂‖² over the elements of each sample (DDPM, eq. 14)."""
  return _sample_mean(jnp.square(prediction.astype(jnp.float32) - noise.astype(jnp.float32)))


def weighted_denoising(
  per_sample: Float[Array, "b"], t: Int[Array, "b"], schedule: Schedule, *, snr_gamma: float
) -> Float[Array, "b"]:
  """Return L_IG of each sample as training minimises it: times its min-SNR weight, or unchanged if `snr_gamma` is
  0."""
  if not snr_gamma:
    return per_sample
  return per_sample * schedules.min_snr_weights(schedule, t, gamma=snr_gamma)


def unit_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
  """Compute x / ‖x‖₂ over the last axis, in f32. Vectors shorter than 1e-12 give 0, and gradient 0."""
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  usable = square > _MIN_SQUARE
  # Two `where`s: the gradient of the branch that is not selected is computed, too, and 0 · inf would be NaN.
  return x * jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, square, 1.0)), 0.0)


def temperature(logit_scale: Float[Array, ""]) -> Float[Array, ""]:
  """Compute τ = min(exp(logit_scale), 100). At the limit gradients still pass, so that τ can decrease again."""
  logit_scale = logit_scale.astype(jnp.float32)
  excess = jnp.maximum(logit_scale - MAX_LOGIT_SCALE, 0.0)
  return jnp.exp(logit_scale - jax.lax.stop_gradient(excess))


class _Candidates(NamedTuple):
  """The candidates that every anchor is compared with.

  Attributes:
    captions: a number for each caption, and whether its candidate is allowed. They are one array, since the TPU
      compiler cannot estimate programs that gather boolean arrays.
  """

  vectors: Float[Array, "b d"]
  captions: Integer[Array, "b 2"]
  scale: Float[Array, ""]


class _Anchors(NamedTuple):
  """Some or all rows of a device, with their places in the batch."""

  vectors: Float[Array, "n d"]
  captions: Integer[Array, "n"]
  places: Int[Array, "n"]


def _direction(candidates: _Candidates, own: _Anchors) -> Direction:
  """Compute for each anchor −log softmax of its own candidate's logit, and whether that logit is the largest.

  The softmax is over the anchor's own candidate and the allowed ones of other captions. No more than _LOGITS logits of
  a device exist at a time.
  """
  n, b = len(own.vectors), len(candidates.vectors)
  their_captions, allowed = candidates.captions.T

  def of_rows(rows: _Anchors) -> Direction:
    precision = jax.lax.Precision.HIGHEST
    logits = candidates.scale * jnp.einsum("id,jd->ij", rows.vectors, candidates.vectors, precision=precision)
    # By place, not by caption: a row is its own positive even if another row has the same caption.
    itself = rows.places[:, None] == jnp.arange(b)
    among = itself | ((allowed > 0) & (rows.captions[:, None] != their_captions))
    positive = jnp.where(itself, logits, 0.0).sum(axis=1)
    nearest = jnp.argmax(jnp.where(among, logits, -jnp.inf), axis=1) == rows.places
    return Direction(jax.nn.logsumexp(logits, axis=1, where=among) - positive, nearest)

  parts = 1
  while n * b // parts > _LOGITS and n % (2 * parts) == 0:
    parts *= 2
  if parts == 1:
    return of_rows(own)
  split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), own)
  # Checkpointed: otherwise the backward pass would keep the logits of all parts, which the split should avoid.
  return jax.tree.map(lambda x: x.reshape(n), jax.lax.map(jax.checkpoint(of_rows), split))


def _mean_over(per_sample: Float[Array, "b"], rows: Bool[Array, "b"]) -> Float[Array, ""]:
  return jnp.where(rows, per_sample, 0.0).sum() / jnp.maximum(rows.sum(dtype=jnp.float32), 1.0)


def contrastive(
  query: Float[Array, "b d"],
  e: Float[Array, "b d"],
  logit_scale: Float[Array, ""],
  *,
  captions: Integer[Array, "b"] | None = None,
  dropped: Bool[Array, "b"] | None = None,
  on_rows: Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]] = lambda f: f,
) -> Contrastive:
  """Compute L_ITA, symmetric InfoNCE over the global batch on s_ij = τ ⟨norm(ê_i), e_j⟩.

  Args:
    query: ê_0, the denoised text queries, of any length.
    e: the captions' text queries, L2-normalised.
    logit_scale: τ = min(exp(logit_scale), 100).
    captions: a number for each caption, such as `caption_ids`. Pairs with equal captions are not negatives of each
      other (not stated by the paper): they are left out of both softmaxes. By default all captions differ.
    dropped: rows whose image was replaced by zeros for guidance. Their role is not stated by the paper. Here they are
      anchors from ê to e, which trains the unconditional prediction. From e to ê they are neither anchors nor
      candidates, since their ê has no image. Each direction's mean is over its own anchors.
    on_rows: turns f(whole, rows) into a function that runs on each device's own rows (sharding.each_own_rows).

  Returns:
    the loss, as the mean of both directions; each direction's losses by sample; and the accuracy, the share of rows
    with an image whose ê is nearest to their own e among the candidates.
  """
  b = len(query)
  kept = jnp.ones(b, bool) if dropped is None else ~dropped
  # e has unit length already. ê has any length, which this loss does not train.
  image, text = unit_norm(query), e.astype(jnp.float32)
  captions = jnp.arange(b) if captions is None else captions
  direction, scale, places = on_rows(_direction), temperature(logit_scale), jnp.arange(b)

  def losses_of(anchors: Array, candidates: Array, allowed: Array) -> Direction:
    theirs = jnp.stack([captions, allowed.astype(captions.dtype)], axis=1)
    return direction(_Candidates(candidates, theirs, scale), _Anchors(anchors, captions, places))

  query_to_text = losses_of(image, text, jnp.ones(b, bool))
  text_to_query = jnp.where(kept, losses_of(text, image, kept).loss, 0.0)
  return Contrastive(
    loss=0.5 * (query_to_text.loss.mean() + _mean_over(text_to_query, kept)),
    query_to_text=query_to_text.loss,
    text_to_query=text_to_query,
    # Only rows with an image count: the others show how much e_t reveals, not how well the image is read.
    accuracy=_mean_over(query_to_text.is_nearest.astype(jnp.float32), kept),
  )


def caption_ids(tokens: Int[Array, "b l"]) -> UInt32[Array, "b"]:
  """Compute a 32-bit polynomial hash of each caption.

  Captions that differ in one token never collide; a pair of others collides with a probability near 2^-32.
  """
  powers = np.array([pow(_HASH_MULTIPLIER, i, 2**32) for i in range(tokens.shape[1])], np.uint32)
  return jnp.sum(tokens.astype(jnp.uint32) * powers, axis=1, dtype=jnp.uint32)


def by_timestep_quarter(per_sample: Float[Array, "b"], t: Int[Array, "b"], rows: Bool[Array, "b"]) -> Quarters:
  """Sum and count a per-sample loss over these rows, by the quarter of 0 ... T-1 in which the timestep lies."""
  # Sums and counts instead of means: a quarter without samples in a microbatch has no mean.
  quarter = jax.nn.one_hot(t * 4 // NUM_TIMESTEPS, 4, dtype=jnp.float32) * rows[:, None].astype(jnp.float32)
  return Quarters(sum=jnp.sum(per_sample[:, None] * quarter, axis=0), count=quarter.sum(axis=0))


def reconstruction(
  x: Float[Array, "b h w c"],
  x_hat: Float[Array, "b h w c"],
  *,
  mean: Float[Array, "b ..."],
  log_variance: Float[Array, "b ..."],
  kl_weight: float,
) -> Reconstruction:
  """Compute the autoencoder's loss: L1 over pixels + kl_weight · KL(N(mean, exp(log_variance)) ‖ N(0, I)).

  L1 is the mean over a sample's pixels and channels, and KL the mean over its latent elements, so that kl_weight does
  not depend on the sizes; Stable Diffusion sums both. Not stated by the paper, which trains no autoencoder.
  """
  x, x_hat, mean, log_variance = (a.astype(jnp.float32) for a in (x, x_hat, mean, log_variance))
  l1 = _sample_mean(jnp.abs(x_hat - x))
  kl = _sample_mean(0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance))
  return Reconstruction(loss=l1 + kl_weight * kl, l1=l1, kl=kl)
