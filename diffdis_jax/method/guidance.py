"""Classifier-free guidance around any denoise function that takes a condition (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Condition = Any  # pytree of arrays that share the batch axis
ConditionalDenoise = Callable[[Float[Array, "b ..."], Int[Array, "b"], Condition], Float[Array, "b ..."]]


def branches(
  denoise: ConditionalDenoise, *, condition: Condition, null: Condition
) -> Callable[[Float[Array, "b ..."], Int[Array, "b"]], tuple[Float[Array, "b ..."], Float[Array, "b ..."]]]:
  """Both predictions at (x, t), ε_u under the null condition and ε_c under the condition, from one batch of 2b.

  Args:
    denoise: (x_t, t, condition) -> prediction.
    condition: leaves [b, ...].
    null: same structure; leaves [b, ...], or anything that broadcasts to them.
  """
  # A sample's two branches lie side by side, so that a batch sharded over devices is doubled without moving.
  both = jax.tree.map(
    lambda u, c: jnp.stack((jnp.broadcast_to(u, c.shape), c), axis=1).reshape(-1, *c.shape[1:]), null, condition
  )

  def predict(x: Float[Array, "b ..."], t: Int[Array, "b"]) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    prediction = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), both)
    unconditional, conditional = jnp.unstack(prediction.reshape(len(x), 2, *prediction.shape[1:]), axis=1)
    return unconditional, conditional

  return predict


def mix(
  unconditional: Float[Array, "b ..."], conditional: Float[Array, "b ..."], scale: float | Float[Array, ""]
) -> Float[Array, "b ..."]:
  """ε_u + s (ε_c − ε_u)."""
  return unconditional + scale * (conditional - unconditional)


def guided(
  denoise: ConditionalDenoise, *, condition: Condition, null: Condition, scale: float
) -> Callable[[Float[Array, "b ..."], Int[Array, "b"]], Float[Array, "b ..."]]:
  """ε_u + s (ε_c − ε_u) as a function of (x_t, t), both branches in one batch of 2b. s = 1 + w of the paper.

  Args:
    denoise: (x_t, t, condition) -> prediction. Its target may be the data too: guidance is the same affine mix.
    condition, null: as `branches` takes them.
    scale: s. At 1 the unconditional branch is not computed.
  """
  if scale == 1.0:
    return lambda x, t: denoise(x, t, condition)
  both = branches(denoise, condition=condition, null=null)
  return lambda x, t: mix(*both(x, t), scale)
