"""Classifier-free guidance for any denoising function with a condition (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Condition = Any  # pytree of arrays that share the batch axis
Denoise = Callable[[Float[Array, "b ..."], Int[Array, "b"], Condition], Float[Array, "b ..."]]


def guide(
  denoise: Denoise,
  x_t: Float[Array, "b ..."],
  t: Int[Array, "b"],
  *,
  condition: Condition,
  null: Condition,
  scale: float | Float[Array, ""],
) -> Float[Array, "b ..."]:
  """Compute ε_u + s (ε_c − ε_u), with both branches in one batch of 2b rows. s is 1 + w of the paper.

  Args:
    denoise: (x_t, t, condition) -> prediction. If the target is the data, guidance is the same affine combination.
    condition: a tree with leaves [b, ...].
    null: a tree of the same structure, whose leaves broadcast to those of `condition`.
    scale: s. For the Python number 1 the unconditional branch is not computed; for an array both are.
  """
  if not isinstance(scale, jax.Array) and scale == 1:
    return denoise(x_t, t, condition)
  # The two branches of a sample are adjacent rows, so that no rows move between devices.
  conditions = jax.tree.map(
    lambda u, c: jnp.stack((jnp.broadcast_to(u, c.shape), c), axis=1).reshape(-1, *c.shape[1:]), null, condition
  )
  prediction = denoise(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2, axis=0), conditions)
  unconditional, conditional = jnp.unstack(prediction.reshape(len(x_t), 2, *prediction.shape[1:]), axis=1)
  # Not (1 − s) ε_u + s ε_c, which is equal but rounds differently from Stable Diffusion's pipeline.
  return unconditional + scale * (conditional - unconditional)
