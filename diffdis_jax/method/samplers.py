"""DDIM with η = 0: from noise to data in a few evaluations of a network (Song et al. 2021).

With y = γ x_0 the process x_t = √ᾱ y + √(1 − ᾱ) ε is the usual one, so the usual step holds for y, and what the network
predicts enters as y = γ x̂_0 or as ε̂. Every step is then linear in (x_t, prediction), with coefficients that depend on
timesteps alone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from diffdis_jax.method import schedules
from diffdis_jax.method.schedules import DATA, Process, Timesteps
from diffdis_jax.structs import AnyArray

# NumPy's where the steps are planned or taken one by one, JAX's inside a program.
Timestep = np.integer | Int[np.ndarray, "*s"] | Int[AnyArray, "*s"]
Coefficient = np.floating | Float[np.ndarray, "*s"] | Float[AnyArray, "*s"]


@struct.dataclass
class DdimCoefficients:
  """The coefficients of x_prev = x_t · [x_t] + prediction · [prediction].

  Of all steps, one number a step, noisiest first; or of a single step, as a scan and `each` give it.

  Attributes:
    t: the timestep at which the network is asked.
    x_t, prediction: f32.
  """

  t: Timestep
  x_t: Coefficient
  prediction: Coefficient

  def each(self) -> Iterator[DdimCoefficients]:
    """Yield the steps one by one, for a caller that has something to do between them."""
    for i in range(np.size(self.t)):
      yield jax.tree.map(operator.itemgetter(i), self)


@struct.dataclass
class DdimStep:
  """The result of a step: x at the timestep before, and x̂_0 as the network sees it at this one."""

  x_prev: Float[AnyArray, "b ..."]
  x_0: Float[AnyArray, "b ..."]


def ddim_coefficients(process: Process, timesteps: Timesteps) -> DdimCoefficients:
  """Compute DDIM's steps with η = 0: y_prev = √ᾱ_prev ŷ + √(1 − ᾱ_prev) ε̂ (Song et al. 2021, eq. 12)."""
  alpha_bar, gamma = schedules.noise_schedule(process.schedule).alpha_bar, process.gamma
  a, s = np.sqrt(alpha_bar[timesteps.t]), np.sqrt(1 - alpha_bar[timesteps.t])
  prev = np.where(timesteps.t_prev == DATA, 1.0, alpha_bar[timesteps.t_prev])
  a_prev, s_prev = np.sqrt(prev), np.sqrt(1 - prev)
  # The network gives one of ŷ = γ x̂_0 and ε̂; the other follows from x_t = √ᾱ ŷ + √(1 − ᾱ) ε̂ and is put in.
  if process.target == "data":  # ε̂ = (x_t − √ᾱ γ x̂_0) / √(1 − ᾱ)
    x_t, prediction = s_prev / s, gamma * (a_prev - s_prev * a / s)
  else:  # ŷ = (x_t − √(1 − ᾱ) ε̂) / √ᾱ
    x_t, prediction = a_prev / a, s_prev - a_prev * s / a
  # Rounded last: in f32 all along, the differences of near-equal numbers would lose what diffusers keeps.
  return DdimCoefficients(t=timesteps.t, x_t=x_t.astype(np.float32), prediction=prediction.astype(np.float32))


def ddim_step(
  process: Process, now: DdimCoefficients, x_t: Float[Array, "b ..."], prediction: Float[Array, "b ..."]
) -> DdimStep:
  """Take one step, from what the network predicts at (x_t, now.t). Nothing is clipped, as in Stable Diffusion.

  Args:
    x_t: f32, not scaled by γ, which scales data and not noise.
    prediction: the data or the noise, as the process's target says.
  """
  prediction = prediction.astype(x_t.dtype)  # the state stays f32, whatever the network computes in
  t = jnp.full(len(x_t), now.t)
  return DdimStep(
    x_prev=x_t * now.x_t + prediction * now.prediction,
    x_0=schedules.to_data(process, x_t, prediction=prediction, t=t),
  )
