"""Measure how well the network predicts an image's noise under each of several prompts, for diffusion_classifier."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from diffdis_jax.common.params import Params
from diffdis_jax.method import losses, schedules
from diffdis_jax.method.network import Network
from diffdis_jax.parallel import sharding


class NoiseErrors:
  """‖ε − ε̂(z_t, t, c)‖² of pairs of an image and a class, and what it takes: three programs of an inference.

  Args:
    inference: of the network, whose devices share the rows.
  """

  def __init__(self, inference: Any):
    self._mesh, self._batched, network = inference.mesh, inference.batched, inference.network
    self._latents = inference.compiled("latents", functools.partial(_latents, network))
    self._conditions = inference.compiled("prompts", functools.partial(_conditions, network))
    self._errors = inference.compiled("noise errors", functools.partial(noise_errors, network))

  def latents(
    self, params: Mapping[str, Any], images: UInt8[np.ndarray, "n H W 3"] | Any
  ) -> Float[np.ndarray, "n h w c"]:
    """Return z of each image, by the posterior's mode."""
    return self._batched(functools.partial(self._latents, params), images)

  def conditions(self, params: Mapping[str, Any], tokens: Int[np.ndarray, "k l"]) -> Float[Array, "k l d"]:
    """Return c of each prompt, whole on every device."""
    c = self._batched(functools.partial(self._conditions, params), tokens)
    return sharding.replicated({"c": c}, self._mesh)["c"]

  def __call__(
    self,
    params: Mapping[str, Any],
    c: Float[Array, "k l d"],
    z: Float[np.ndarray, "n h w c"],
    *,
    seed: int,
    places: Int[np.ndarray, " n"],
    images: Int[np.ndarray, " m"],
    classes: Int[np.ndarray, " m"],
    t: Int[np.ndarray, " s"],
    done: Callable[[int], object] = lambda count: None,
  ) -> Float[np.ndarray, "m s"]:
    """Return the mean square error at each t for each pair of an image and a class, given by their numbers in z and c.

    Noise is of seed, the image's place in its data set and t alone: neither of the class nor of the batch.
    """
    f = functools.partial(self._errors, params, c, jax.random.key(seed), t.astype(np.int32))
    pairs = _Taken(z, images), places[images].astype(np.int32), classes.astype(np.int32)
    return self._batched(f, *pairs, done=done)


@dataclasses.dataclass(frozen=True)
class _Taken:
  """values[rows], without a copy of all of them: an image has as many rows as there are classes."""

  values: Float[np.ndarray, "n h w c"]
  rows: Int[np.ndarray, " m"]

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, places: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b h w c"]:
    return self.values[self.rows[places]]


def _latents(network: Network, params: Params, images: UInt8[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
  model: Any = network.with_params(params)
  return model.encode_image(images).astype(jnp.float32)


def _conditions(network: Network, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
  return network.with_params(params).encode_text(tokens).c


def noise_of(
  key: PRNGKeyArray, t: Int[Array, ""], *, places: Int[Array, "b"], network: Network
) -> Float[Array, "b h w c"]:
  """Return ε ~ N(0, I) of the images at these places in their data set."""
  at_t = jax.random.fold_in(key, t)
  return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(at_t, place), network.latent_shape))(places)


def noise_errors(
  network: Network,
  params: Params,
  c: Float[Array, "k l d"],
  key: PRNGKeyArray,
  t: Int[Array, "s"],
  z: Float[Array, "b h w c"],
  places: Int[Array, "b"],
  classes: Int[Array, "b"],
) -> Float[Array, "b s"]:
  """Return the mean of (ε − ε̂(z_t, t, c))² over an image's latent, at each t, f32. The label is nowhere in it."""
  model: Any = network.with_params(params)
  condition = c[classes]

  def at(t: Int[Array, ""]) -> Float[Array, "b"]:
    # z_t = √ᾱ(t) z + √(1 − ᾱ(t)) ε
    noise, t_z = noise_of(key, t, places=places, network=network), jnp.full(len(z), t)
    z_t = schedules.add_noise(network.image_process, z, noise=noise, t=t_z)
    return losses.denoising(noise, model.generation(z_t=z_t, t_z=t_z, c=condition))

  # One after the other: all at once would take s times the memory.
  return jax.lax.map(at, t).T
