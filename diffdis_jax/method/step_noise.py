"""All random choices of a training step, sampled for all of its rows at once, and the noise of Algorithm 3.

If microbatches form one contrastive batch (training/gradcache.py), choices are sampled before the batch is split. So
they do not depend on the number of microbatches, and a row that is computed twice has the same noise both times.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from diffdis_jax.config.sections import NUM_TIMESTEPS, Loss
from diffdis_jax.method.network import Network
from diffdis_jax.structs import AnyArray, AnyBatch, Batch

Keys = Mapping[str, PRNGKeyArray]


@struct.dataclass
class StepNoise:
  """The random choices for each row, by the name of their key. Noise is from N(0, I)."""

  t_z: Int[AnyArray, "b"]
  noise_z: Float[AnyArray, "b h w c"]
  drop_condition: Bool[AnyArray, "b"]
  t_e: Int[AnyArray, "b"]
  noise_e: Float[AnyArray, "b e"]
  drop_image: Bool[AnyArray, "b"]
  posterior: Float[AnyArray, "b h w c"] | None = None  # None if latents are the posterior's mode
  posterior_discrimination: Float[AnyArray, "b h w c"] | None = None  # None unless that pass has its own view


def sample_noise(keys: Keys, batch: AnyBatch, *, network: Network, loss: Loss, sample_posterior: bool) -> StepNoise:
  """Sample the random choices for a batch.

  Args:
    keys: by the names of `StepNoise`.
    batch: gives the number of rows, and whether discrimination has its own view.
    network: gives the shapes.
    loss: the shares of rows that are masked.
    sample_posterior: the config's field of this name.
  """
  b, latents = len(batch.tokens), network.latent_shape

  def normal(name: str, *shape: int) -> Float[Array, "b ..."]:
    return jax.random.normal(keys[name], (b, *shape))

  def timesteps(name: str) -> Int[Array, "b"]:
    return jax.random.randint(keys[name], (b,), 0, NUM_TIMESTEPS)

  own_view = isinstance(batch, Batch) and batch.discrimination_image is not None
  # Each choice has its own key, so that none depends on the others. All are sampled for any objectives: the compiler
  # removes those that a network does not use.
  return StepNoise(
    t_z=timesteps("t_z"),
    noise_z=normal("noise_z", *latents),
    drop_condition=jax.random.bernoulli(keys["drop_condition"], loss.condition_dropout, (b,)),
    # The two timesteps are independent, since the paper samples one for each task.
    t_e=timesteps("t_e"),
    noise_e=normal("noise_e", network.model.query_width),
    drop_image=jax.random.bernoulli(keys["drop_image"], loss.image_dropout, (b,)),
    posterior=normal("posterior", *latents) if sample_posterior else None,
    posterior_discrimination=normal("posterior_discrimination", *latents) if sample_posterior and own_view else None,
  )


def query_noise(
  key: Key[Array, "*b"], *, num_noise_samples: int, places: Int[Array, "b"], width: int
) -> Float[Array, "{num_noise_samples} b {width}"]:
  """Sample e_T ~ N(0, I) for the images at these places in their data set, with one key or a key for each image."""

  # The noise depends only on key, sample and place, so that an image's score does not depend on its batch.
  def noise(sample: Int[Array, ""], key: Key[Array, ""], place: Int[Array, ""]) -> Float[Array, "d"]:
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), place), (width,))

  def of_places(sample: Int[Array, ""]) -> Float[Array, "b d"]:
    return jax.vmap(functools.partial(noise, sample))(jnp.broadcast_to(key, places.shape), places)

  return jax.vmap(of_places)(jnp.arange(num_noise_samples))


def noise_at(
  key: PRNGKeyArray, t: Int[Array, ""], *, sample: Int[Array, ""], places: Int[Array, "b"], network: Network
) -> StepNoise:
  """Return the choices with which a loss is measured for the images at these places: t_z = t_e = t, noise that depends
  only on key, sample and place, nothing dropped, and the posterior's mode."""
  rows = jnp.full(places.shape, t, jnp.int32)
  kept = jnp.zeros(places.shape, bool)

  def normal(number: int, *shape: int) -> Float[Array, "b ..."]:
    of_sample = jax.random.fold_in(jax.random.fold_in(key, number), sample)
    return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(of_sample, place), shape))(places)

  return StepNoise(
    t_z=rows,
    noise_z=normal(0, *network.latent_shape),
    drop_condition=kept,
    t_e=rows,
    noise_e=normal(1, network.model.query_width),
    drop_image=kept,
  )
