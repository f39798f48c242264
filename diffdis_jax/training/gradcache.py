"""Split a contrastive batch exactly into several microbatches: GradCache (Gao et al., 2021, arXiv:2101.06983).

A contrastive loss couples all rows of a batch, but only by the two representations of each row. So a step passes over
the microbatches twice:

1. the first pass, without gradient, computes the representations of all rows;
2. then the loss of all rows is computed, and its gradient with respect to the representations, which is the cache;
3. the second pass adds up the gradients of Σ <representation, cached gradient>, which give the loss's gradient.

L_IG couples no rows, so that generation is only in the second pass. logit_scale, the loss's own parameter, gets its
gradient in step 2. Both passes have the same noise and the same latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.method import algorithms, encode, losses, schedules
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.encode import Encoded, Latents
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import Keys, StepNoise
from diffdis_jax.models.clip import Clip
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import AnyBatch, Batch, Pairs, TextCondition
from diffdis_jax.training import losses as objectives
from diffdis_jax.training.losses import Gradient
from diffdis_jax.training.metrics import Metrics, mean_of

LOGIT_SCALE = "logit_scale"
# The two vectors of each row in the contrastive loss: ê_0 and e, or the outputs of CLIP's two towers; f32.
REPRESENTATIONS = ("query", "e")

# The arrays of each row by name: REPRESENTATIONS, and encodings that the second pass uses again. This is no struct,
# since a loop stacks the arrays of its turns.
Rows = dict[str, Float[Array, "b ..."]]


class Microbatch(NamedTuple):
  """The rows of a pass, and their noise, which CLIP does not have."""

  batch: AnyBatch
  noise: StepNoise | None


class Pass(NamedTuple):
  """The gradients of a pass, summed over rows, and the arrays of each row for the next pass."""

  gradient: Params
  rows: Rows


class GradCache:
  """Compute the gradient and the metrics of a loss on a whole batch, in `n` microbatches one after another.

  Args:
    network: any network but an autoencoder alone.
    run: the config, which determines the loss.
    mesh: the devices, each of which splits its own rows into n parts.
    n: number of microbatches.
  """

  def __init__(self, network: Network, run: Run, mesh: Mesh, n: int):
    self.network, self.run, self.mesh, self.n = network, run, mesh, n

  def __call__(self, trainable: Params, fixed: Params, batch: AnyBatch, keys: Keys) -> Gradient:
    """Compute the gradient of the trainable parameters, f32, and the metrics of all rows at once."""
    gathered = functools.partial(sharding.gathered, mesh=self.mesh, dtype=self.network.dtype)
    params = gathered(trainable), gathered(fixed)  # gathered once for both passes
    # Sample before the rows are split, so that the noise does not depend on n and is the same in both passes.
    noise = None if self.network.is_clip else objectives.noise_of(self.run, keys, batch, self.network)
    rows = Microbatch(batch, noise)

    total, metrics = jnp.zeros(()), {}
    first: Rows = {}
    cache: Rows = {}
    scale_gradient = jnp.zeros(())
    if self.network.task.contrasts:
      first = self._in_turn(self.first_pass, params, (rows,)).rows
      scale = {**fixed, **trainable}[LOGIT_SCALE]  # a config may freeze it
      contrast = jax.value_and_grad(self._contrast, argnums=(0, 1), has_aux=True)
      (total, metrics), (cache, scale_gradient) = contrast({name: first[name] for name in REPRESENTATIONS}, scale, rows)

    second_pass = functools.partial(self.second_pass, batch_size=len(batch.tokens))
    gradient, second = self._in_turn(second_pass, params, (rows, first, cache), summed=trainable)
    if LOGIT_SCALE in gradient:  # its gradient by the passes is 0
      gradient[LOGIT_SCALE] += scale_gradient
    if noise is not None and "loss_generation" in second:
      per_sample = second["loss_generation"]
      total = total + self._weighted(per_sample, noise).mean()
      metrics |= objectives.generation_metrics(per_sample, noise)
    return Gradient(gradient, {"loss": mean_of(total[None]), **metrics})

  def first_pass(self, trainable: Params, fixed: Params, rows: Microbatch) -> Pass:
    """Compute the representations without a gradient, and the encodings that both passes use."""
    model = self.network.with_params({**fixed, **trainable})
    if isinstance(model, Clip):
      return Pass({}, _pairs(model, rows))
    assert rows.noise is not None
    encoded = encode.encode_rows(model, rows.batch, rows.noise)
    encoded_rows = self._predict(model, rows, encoded, passes=("discrimination",))
    encoded_rows["z"] = encoded.latents.z
    if encoded.latents.z_discrimination is not None:
      encoded_rows["z_discrimination"] = encoded.latents.z_discrimination
    if _text_is_encoded_once(trainable):
      encoded_rows["c"] = encoded.text.c
    return Pass({}, encoded_rows)

  def second_pass(
    self, trainable: Params, fixed: Params, rows: Microbatch, first: Rows, cache: Rows, *, batch_size: int
  ) -> Pass:
    """Compute the gradient of these rows' part of L_IG, a mean over the batch, and of L_ITA by the cache."""

    def share(trainable: Params) -> tuple[Float[Array, ""], Rows]:
      model = self.network.with_params({**fixed, **trainable})
      if isinstance(model, Clip):
        predicted = _pairs(model, rows)
      else:
        predicted = self._predict(model, rows, _encoded(model, rows, first), passes=self.network.objectives)
      # The sum is linear in the representations, so that its gradient is the loss's, by the chain rule.
      total = sum((jnp.sum(predicted[name] * cache[name]) for name in cache), start=jnp.zeros(()))
      if "loss_generation" not in predicted:
        return total, {}
      # Divide by the batch's size, not the microbatch's, so that the parts add up to the mean.
      assert rows.noise is not None
      per_sample = predicted["loss_generation"]
      return total + jnp.sum(self._weighted(per_sample, rows.noise)) / batch_size, {"loss_generation": per_sample}

    return Pass(*jax.grad(share, has_aux=True)(trainable))

  def _predict(self, model: DiffDis, rows: Microbatch, encoded: Encoded, *, passes: Sequence[str]) -> Rows:
    assert rows.noise is not None
    c_null = encode.null_condition(model, rows.batch.tokens.shape[1])
    denoised = algorithms.denoise_rows(model, encoded, c_null, rows.noise, network=self.network, passes=passes)
    predicted = {} if denoised.loss_generation is None else {"loss_generation": denoised.loss_generation}
    if denoised.query is not None:
      predicted |= {"query": denoised.query.astype(jnp.float32), "e": encoded.text.e}
    return predicted

  def _weighted(self, per_sample: Float[Array, "b"], noise: StepNoise) -> Float[Array, "b"]:
    schedule = schedules.noise_schedule(self.network.image_process.schedule)
    return losses.weighted_denoising(per_sample, noise.t_z, schedule, snr_gamma=self.run.loss.snr_gamma)

  def _contrast(
    self, representations: Rows, logit_scale: Float[Array, ""], rows: Microbatch
  ) -> tuple[Float[Array, ""], Metrics]:
    """Compute CLIP's loss or λ L_ITA of the whole batch. Only here do rows interact."""
    query, e = (representations[name] for name in REPRESENTATIONS)
    captions = objectives.captions_of(self.run.loss, rows.batch.tokens)
    if rows.noise is None:
      total, (metrics, _) = objectives.contrastive_loss(Pairs(image=query, text=e), logit_scale, captions=captions)
      return total, metrics
    contrast = losses.contrastive(
      query, e, logit_scale, captions=captions, dropped=rows.noise.drop_image, on_rows=sharding.each_own_rows
    )
    metrics = objectives.discrimination_metrics(contrast, logit_scale, rows.noise)
    return self.run.loss.ita_weight * contrast.loss, metrics

  def _in_turn(
    self,
    f: Callable[..., Pass],
    params: tuple[Params, Params],
    rows: tuple[Any, ...],
    summed: Params | None = None,
  ) -> Pass:
    """Call f(trainable, fixed, *rows) on each microbatch; add up the gradients, and join the arrays of rows.

    Args:
      rows: trees of arrays of all rows.
      summed: the parameters of which f returns gradients.
    """
    leaves, kind = jax.tree.flatten(rows)

    def of_device(params: tuple[Params, Params], leaves: list[Array]) -> Pass:
      def one(total: Params, microbatch: list[Array]) -> tuple[Params, Rows]:
        gradient, results = f(*params, *jax.tree.unflatten(kind, microbatch))
        # Add in the parameters' f32: in bf16, a sum soon loses small terms.
        return {path: total[path] + x.astype(total[path].dtype) for path, x in gradient.items()}, results

      zeros = {path: jnp.zeros(x.shape, x.dtype) for path, x in (summed or {}).items()}
      split = [x.reshape(self.n, -1, *x.shape[1:]) for x in leaves]
      total, results = jax.lax.scan(one, zeros, split)
      return Pass(total, {name: x.reshape(-1, *x.shape[2:]) for name, x in results.items()})

    return Pass(*sharding.on_own_rows(of_device, self.mesh, summed or {})(params, leaves))


def _pairs(clip: Clip, rows: Microbatch) -> Rows:
  assert isinstance(rows.batch, Batch)
  pairs = encode.encode_pairs(clip, rows.batch)
  return {"query": pairs.image, "e": pairs.text}


def _text_is_encoded_once(trainable: Params) -> bool:
  """Return whether the first pass encodes the text for both passes, which needs a frozen text tower."""
  return not any(path.startswith("text_encoder.") for path in trainable)


def _encoded(model: DiffDis, rows: Microbatch, first: Rows) -> Encoded:
  """Return the encodings, those of the first pass or computed again."""
  assert rows.noise is not None
  if "z" not in first:  # generation alone has no first pass
    return encode.encode_rows(model, rows.batch, rows.noise)
  text = encode.encode_captions(model, rows.batch) if "c" not in first else TextCondition(c=first["c"], e=first["e"])
  return Encoded(latents=Latents(first["z"], first.get("z_discrimination")), text=text)
