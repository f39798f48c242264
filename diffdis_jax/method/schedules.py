"""Noise schedules, the forward process and its inverse, and the timesteps of samplers.

Both processes have one form, with the text query's feature scaling γ (appendix, Tables 2 and 3; γ = 1 for images):

    x_t = γ √ᾱ(t) x_0 + √(1 − ᾱ(t)) ε,     ᾱ(t) = Π_{s ≤ t} (1 − β(s)),     t = 0 ... T-1
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffdis_jax.config.section import check_choice
from diffdis_jax.config.sections import NUM_TIMESTEPS, SCHEDULES, ImageDiffusion, TextDiffusion
from diffdis_jax.errors import UserError

Process = ImageDiffusion | TextDiffusion
BETA_START, BETA_END, BETA_MAX = 0.00085, 0.012, 0.999
DATA = -1  # the timestep of the data itself, at which ᾱ = 1; it is one before the first


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A noise schedule in float64, so that coefficients are exact. Programs close over it, since it is no pytree."""

  betas: Float[np.ndarray, "T"]
  alpha_bar: Float[np.ndarray, "T"]


@dataclasses.dataclass(frozen=True, eq=False)
class Timesteps:
  """The steps of a sampler, noisiest first: step i goes from t[i] to t_prev[i], which is t[i+1].

  The last t_prev is the end of the process: `DATA`, or 0 for Stable Diffusion's final alpha, ᾱ(0).
  """

  t: Int[np.ndarray, "s"]
  t_prev: Int[np.ndarray, "s"]


def _scaled_linear(n: int) -> Float[np.ndarray, "T"]:
  return np.linspace(BETA_START**0.5, BETA_END**0.5, n) ** 2


def _linear(n: int) -> Float[np.ndarray, "T"]:
  return np.linspace(BETA_START, BETA_END, n)


def _cosine(n: int) -> Float[np.ndarray, "T"]:
  """Compute the cosine schedule (Nichol and Dhariwal 2021, eq. 17, s = 0.008)."""
  # As in their code, β is computed from ratios of ᾱ: the bound on β changes the last timesteps of ᾱ.
  alpha_bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], BETA_MAX)


BETAS = {"scaled_linear": _scaled_linear, "linear": _linear, "cosine": _cosine}  # SCHEDULES


@functools.cache
def noise_schedule(name: str) -> Schedule:
  """Return the schedule with this name, one of SCHEDULES.

  Stable Diffusion's code and the paper's appendix call `scaled_linear` "linear".

  Raises:
    UserError: no schedule has that name.
  """
  check_choice("schedule", name, SCHEDULES)
  betas = BETAS[name](NUM_TIMESTEPS)
  return Schedule(betas=betas, alpha_bar=np.cumprod(1 - betas))


def leading(num_steps: int) -> Timesteps:
  """Return Stable Diffusion's steps: multiples of T // n, offset by 1, ending at ᾱ(0). For n = 50: 981, 961, ..., 1.

  Raises:
    UserError: not 1 ... T-1 steps.
  """
  if not 1 <= num_steps < NUM_TIMESTEPS:
    raise UserError(f"{num_steps} sampling steps; leading spacing takes 1 to {NUM_TIMESTEPS - 1}")
  # The offset and the final ᾱ(0) are Stable Diffusion's published settings, which exports must match.
  t = np.arange(num_steps)[::-1] * (NUM_TIMESTEPS // num_steps) + 1
  return Timesteps(t=t.astype(np.int32), t_prev=np.append(t[1:], 0).astype(np.int32))


def trailing(num_steps: int) -> Timesteps:
  """Return steps from T-1, where x_t is N(0, I), to the data. For n = 1 it is a single evaluation at T-1.

  Discrimination uses these steps (their spacing for n > 1 is not stated by the paper). If the number of steps does not
  divide T, t_prev is still the next t.

  Raises:
    UserError: not 1 ... T steps.
  """
  if not 1 <= num_steps <= NUM_TIMESTEPS:
    raise UserError(f"{num_steps} sampling steps; trailing spacing takes 1 to {NUM_TIMESTEPS}")
  t = np.round(np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / num_steps))[:num_steps] - 1  # arange may give one too many
  return Timesteps(t=t.astype(np.int32), t_prev=np.append(t[1:], DATA).astype(np.int32))


def _rates(process: Process, t: Int[Array, "b"], ndim: int) -> tuple[Array, Array]:
  """Return √ᾱ(t) and √(1 − ᾱ(t)), f32, with trailing axes of size 1 up to the rank `ndim`."""
  # Roots are taken in float64 and rounded once: 1 − ᾱ in f32 would lose digits at small t, where ᾱ is near 1.
  shape, alpha_bar = t.shape + (1,) * (ndim - t.ndim), noise_schedule(process.schedule).alpha_bar
  tables = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
  signal, noise = (jnp.asarray(table, jnp.float32)[t].reshape(shape) for table in tables)
  return signal, noise


def min_snr_weights(schedule: Schedule, t: Int[Array, "b"], *, gamma: float) -> Float[Array, "b"]:
  """Compute min(SNR, γ) / SNR, f32, for predictions of noise, with SNR = ᾱ / (1 − ᾱ) (Hang et al., 2023, eq. 5).

  `gamma` is the γ of these weights, above 0, and not that of the process.
  """
  snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
  return jnp.asarray(np.minimum(snr, gamma) / snr, jnp.float32)[t]


def add_noise(
  process: Process, x0: Float[Array, "b ..."], *, noise: Float[Array, "b ..."], t: Int[Array, "b"]
) -> Float[Array, "b ..."]:
  """Compute x_t = γ √ᾱ x_0 + √(1 − ᾱ) ε, in f32."""
  # γ scales the data and not the noise: with a smaller γ, e_t reveals less of its caption.
  a, s = _rates(process, t, x0.ndim)
  return process.gamma * a * x0 + s * noise


def to_data(
  process: Process, x_t: Float[Array, "b ..."], *, prediction: Float[Array, "b ..."], t: Int[Array, "b"]
) -> Float[Array, "b ..."]:
  """Compute x_0 from the network's prediction, which is the data or the noise (appendix, Table 2). From noise ε it is,
  in f32, (x_t − √(1 − ᾱ) ε) / (γ √ᾱ)."""
  if process.target == "data":
    return prediction
  # Divide by γ: otherwise ê_0 of target `noise` would be γ e, and the next e_t would have the mean γ² e.
  a, s = _rates(process, t, x_t.ndim)
  return (x_t - s * prediction) / (process.gamma * a)
