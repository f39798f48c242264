"""DDIM with η = 0, from noise to data in a few evaluations of a network (Song et al. 2021).

For y = γ x_0 the process x_t = √ᾱ y + √(1 − ᾱ) ε is the usual one, so that the usual step holds for y. The network's
prediction enters as ŷ = γ x̂_0 or as ε̂. Every step is linear in (x_t, prediction), with coefficients that depend only
on timesteps.
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

# NumPy numbers outside of a program, where steps are planned or taken one by one, and JAX arrays inside.
Timestep = np.integer | Int[np.ndarray, "*s"] | Int[AnyArray, "*s"]
Coefficient = np.floating | Float[np.ndarray, "*s"] | Float[AnyArray, "*s"]


@struct.dataclass
class DdimCoefficients:
  """The two coefficients of x_prev = a x_t + b prediction.

  Fields have a number for each step, noisiest first, or the number of a single step, as in a scan or from `each`.

  Attributes:
    t: the timestep at which the network is evaluated.
    x_t, prediction: a and b, f32.
  """

  t: Timestep
  x_t: Coefficient
  prediction: Coefficient

  def each(self) -> Iterator[DdimCoefficients]:
    """Yield the steps one by one, for a caller that does something between them."""
    for i in range(np.size(self.t)):
      yield jax.tree.map(operator.itemgetter(i), self)


@struct.dataclass
class DdimStep:
  """The result of a step: x at the previous, less noisy timestep, and the estimate x̂_0 at this one."""

  x_prev: Float[AnyArray, "b ..."]
  x_0: Float[AnyArray, "b ..."]


def ddim_coefficients(process: Process, timesteps: Timesteps) -> DdimCoefficients:
  """Compute DDIM's steps with η = 0: y_prev = √ᾱ_prev ŷ + √(1 − ᾱ_prev) ε̂ (Song et al. 2021, eq. 12)."""
  alpha_bar, gamma = schedules.noise_schedule(process.schedule).alpha_bar, process.gamma
  a, s = np.sqrt(alpha_bar[timesteps.t]), np.sqrt(1 - alpha_bar[timesteps.t])
  prev = np.where(timesteps.t_prev == DATA, 1.0, alpha_bar[timesteps.t_prev])
  a_prev, s_prev = np.sqrt(prev), np.sqrt(1 - prev)
  # The network predicts one of ŷ = γ x̂_0 and ε̂; the other follows from x_t = √ᾱ ŷ + √(1 − ᾱ) ε̂.
  if process.target == "data":  # ε̂ = (x_t − √ᾱ γ x̂_0) / √(1 − ᾱ)
    x_t, prediction = s_prev / s, gamma * (a_prev - s_prev * a / s)
  else:  # ŷ = (x_t − √(1 − ᾱ) ε̂) / √ᾱ
    x_t, prediction = a_prev / a, s_prev - a_prev * s / a
  # Rounded at the end: in f32, differences of nearly equal numbers would be less exact than diffusers'.
  return DdimCoefficients(t=timesteps.t, x_t=x_t.astype(np.float32), prediction=prediction.astype(np.float32))


def ddim_step(
  process: Process, now: DdimCoefficients, x_t: Float[Array, "b ..."], prediction: Float[Array, "b ..."]
) -> DdimStep:
  """Take one step with the network's prediction at (x_t, now.t). Nothing is clipped, as in Stable Diffusion.

  Args:
    x_t: the state, f32. It is not divided by γ, which scales data and not noise.
    prediction: the data or the noise, depending on the process's target.
  """
  prediction = prediction.astype(x_t.dtype)  # the state stays f32 for any dtype of the network
  t = jnp.full(len(x_t), now.t)
  return DdimStep(
    x_prev=x_t * now.x_t + prediction * now.prediction,
    x_0=schedules.to_data(process, x_t, prediction=prediction, t=t),
  )
