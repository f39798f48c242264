"""Every random choice of a diffusion step, drawn for all of its rows at once, and what the two passes make of it.

Drawn before a batch is split into microbatches, so that it does not depend on how many there are, and that a row which
is computed twice has the same noise both times.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffdis_jax.method import schedules
from diffdis_jax.method.network import Network
from diffdis_jax.method.schedules import Process
from diffdis_jax.structs import AnyArray, AnyBatch, Batch, DiscriminationPass, GenerationPass

Keys = Mapping[str, PRNGKeyArray]


@struct.dataclass
class StepNoise:
  """The random choices of each row, by the name of their key. Noise is from N(0, I)."""

  t_z: Int[AnyArray, "b"]
  noise_z: Float[AnyArray, "b h w c"]
  drop_condition: Bool[AnyArray, "b"]
  t_e: Int[AnyArray, "b"]
  noise_e: Float[AnyArray, "b e"]
  drop_image: Bool[AnyArray, "b"]
  posterior: Float[AnyArray, "b h w c"] | None = None  # where latents are draws from it, and not its mode
  posterior_discrimination: Float[AnyArray, "b h w c"] | None = None  # where that pass has a view of its own, too


def sample_noise(
  keys: Keys,
  batch: AnyBatch,
  *,
  network: Network,
  condition_dropout: float,
  image_dropout: float,
  sample_posterior: bool,
) -> StepNoise:
  """The draws of a batch, by a key for each. What a network has no use for, the compiler leaves out.

  Args:
    keys: by the names of `StepNoise`.
    batch: gives the number of rows, and whether discrimination has a view of its own.
    network: gives the shapes, and the number of timesteps.
    condition_dropout, image_dropout, sample_posterior: as objectives.Loss has them.
  """
  b, latents = len(batch.tokens), network.latent_shape
  normal = lambda name, *shape: jax.random.normal(keys[name], (b, *shape))
  timesteps = lambda name, process: jax.random.randint(keys[name], (b,), 0, process.noise.num_timesteps)
  own_view = isinstance(batch, Batch) and batch.discrimination_image is not None
  return StepNoise(
    t_z=timesteps("t_z", network.image_process),
    noise_z=normal("noise_z", *latents),
    drop_condition=jax.random.bernoulli(keys["drop_condition"], condition_dropout, (b,)),
    t_e=timesteps("t_e", network.text_process),
    noise_e=normal("noise_e", network.model.query_width),
    drop_image=jax.random.bernoulli(keys["drop_image"], image_dropout, (b,)),
    posterior=normal("posterior", *latents) if sample_posterior else None,
    posterior_discrimination=normal("posterior_discrimination", *latents) if sample_posterior and own_view else None,
  )


def noised_generation(
  z: Float[Array, "b h w c"],
  c: Float[Array, "b l d"],
  c_null: Float[Array, "b l d"],
  draws: StepNoise,
  *,
  process: Process,
) -> GenerationPass:
  """z_t, t_z and c, which is the null condition in the rows where it is dropped."""
  z_t = schedules.add_noise(process.noise, z, noise=draws.noise_z, t=draws.t_z, gamma=process.gamma)
  return GenerationPass(z_t=z_t, t_z=draws.t_z, c=jnp.where(draws.drop_condition[:, None, None], c_null, c))


def noised_discrimination(
  z: Float[Array, "b h w c"],
  e: Float[Array, "b e"],
  c_null: Float[Array, "b l d"],
  draws: StepNoise,
  *,
  process: Process,
  condition_timestep: int,
) -> DiscriminationPass:
  """e_t, t_e and z, which is zeros in the rows where the image is dropped.

  The noised query is data, not a path for gradients: a text tower in training learns from e as the target only.
  """
  e_t = schedules.add_noise(
    process.noise, jax.lax.stop_gradient(e), noise=draws.noise_e, t=draws.t_e, gamma=process.gamma
  )
  return DiscriminationPass(
    e_t=e_t,
    t_e=draws.t_e,
    z=jnp.where(draws.drop_image[:, None, None, None], 0.0, z),
    t_z=jnp.full((len(z),), condition_timestep, jnp.int32),
    c_null=c_null,
  )
