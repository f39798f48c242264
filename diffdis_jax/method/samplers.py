"""DDIM and DDPM: from noise to data in a few evaluations of a denoise function, compiled as one program.

With y = γ x_0 the process x_t = √ᾱ y + √(1 − ᾱ) ε is the usual one, so the usual steps hold for y, and what the
network predicts enters as y = γ x̂_0 or as ε̂. Every step is then linear in (x_t, prediction, fresh noise), with
coefficients that depend on timesteps alone: they are computed beforehand in float64, and a step is one line.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffdis_jax.errors import UserError
from diffdis_jax.method.schedules import DATA, Schedule, Target, Timesteps, check_target

Method = str  # ddim, ddpm
Steps = int | np.integer | Int[np.ndarray, "s"]
Weights = float | Float[np.ndarray, "*s"]
Coefficient = float | np.floating | Float[np.ndarray, "*s"] | Float[Array, "*s"]
Denoise = Callable[[Float[Array, "b ..."], Int[Array, "b"]], Float[Array, "b ..."]]


@struct.dataclass
class Coefficients:
  """x_prev = x_t · [x_t] + prediction · [prediction] + noise · [fresh N(0, I)]; one number a step."""

  x_t: Coefficient
  prediction: Coefficient
  noise: Coefficient


def _alpha_bar(schedule: Schedule, t: Steps) -> Weights:
  return np.where(np.equal(t, DATA), 1.0, schedule.alpha_bar[t])


def _from_data_and_noise(
  schedule: Schedule, t: Steps, target: Target, gamma: float, *, y: Weights, epsilon: Weights, noise: Weights
) -> Coefficients:
  """Of x_prev = y · [γ x̂_0] + epsilon · [ε̂] + noise · [fresh], the prediction being one of the two."""
  check_target(target)
  a, s = np.sqrt(schedule.alpha_bar[t]), np.sqrt(1 - schedule.alpha_bar[t])
  if target == "data":  # ε̂ = (x_t − √ᾱ γ x̂_0) / √(1 − ᾱ)
    return Coefficients(x_t=epsilon / s, prediction=gamma * (y - epsilon * a / s), noise=noise)
  return Coefficients(x_t=y / a, prediction=epsilon - y * s / a, noise=noise)  # γ x̂_0 = (x_t − √(1 − ᾱ) ε̂) / √ᾱ


def ddim(
  schedule: Schedule, *, t: Steps, t_prev: Steps, target: Target, gamma: float = 1.0, eta: float = 0.0
) -> Coefficients:
  """DDIM's step from t to t_prev (Song et al. 2021, eq. 12 and 16), where t_prev = DATA has ᾱ = 1.

  Args:
    eta: 0 is deterministic; 1 has the ancestral sampler's variance.
  """
  now, prev = _alpha_bar(schedule, t), _alpha_bar(schedule, t_prev)
  variance = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
  return _from_data_and_noise(
    schedule, t, target, gamma, y=np.sqrt(prev), epsilon=np.sqrt(1 - prev - variance), noise=np.sqrt(variance)
  )


def ddpm(schedule: Schedule, *, t: Steps, t_prev: Steps, target: Target, gamma: float = 1.0) -> Coefficients:
  """DDPM's ancestral step from t to t_prev (Ho et al. 2020, eq. 7), of variance β̃, which diffusers calls fixed_small.

  Its mean equals that of DDIM with η = 1.
  """
  return ddim(schedule, t=t, t_prev=t_prev, target=target, gamma=gamma, eta=1.0)


def step(
  coefficients: Coefficients,
  x_t: Float[Array, "b ..."],
  *,
  prediction: Float[Array, "b ..."],
  noise: Float[Array, "b ..."] | None = None,
) -> Float[Array, "b ..."]:
  """x at t_prev. `noise` is fresh N(0, I); None where the step adds none."""
  x = x_t * coefficients.x_t + prediction * coefficients.prediction
  return x if noise is None else x + noise * coefficients.noise


def plan(
  schedule: Schedule,
  timesteps: Timesteps,
  *,
  method: Method = "ddim",
  target: Target,
  gamma: float = 1.0,
  eta: float = 0.0,
) -> Coefficients:
  """The coefficients of all steps, f32. DDPM ends at the data, whatever the spacing, as diffusers' does.

  Raises:
    UserError: unknown method or target.
  """
  if method == "ddim":
    steps = ddim(schedule, t=timesteps.t, t_prev=timesteps.t_prev, target=target, gamma=gamma, eta=eta)
  elif method == "ddpm":
    steps = ddpm(schedule, t=timesteps.t, t_prev=np.append(timesteps.t_prev[:-1], DATA), target=target, gamma=gamma)
  else:
    raise UserError(f"unknown sampling method {method!r}; use one of ddim, ddpm")
  return jax.tree.map(np.float32, steps)


def sample(
  denoise: Denoise,
  x_T: Float[Array, "b ..."],
  *,
  schedule: Schedule,
  timesteps: Timesteps,
  method: Method = "ddim",
  target: Target,
  gamma: float = 1.0,
  key: PRNGKeyArray | None = None,
  eta: float = 0.0,
) -> Float[Array, "b ..."]:
  """x_0 from the noise x_T ~ N(0, I), by one scan over the steps. Samples are not clipped, as in Stable Diffusion.

  With one trailing step and target `data` it is the network's prediction at T-1 (the paper's Algorithm 3, n = 1).

  Args:
    denoise: (x_t, t i32[b]) -> the data or the noise, as `target` says.
    x_T: f32. Not scaled by γ, which scales data and not noise.
    key: for the fresh noise of `ddpm` and of eta > 0; step i uses fold_in(key, i).
    eta: of `ddim`, 0 to 1.

  Raises:
    UserError: unknown method or target, eta out of range, or a key is needed.
  """
  if not 0 <= eta <= 1:
    raise UserError(f"eta is {eta}; it must lie between 0, deterministic, and 1")
  steps = plan(schedule, timesteps, method=method, target=target, gamma=gamma, eta=eta)
  stochastic = bool(np.any(steps.noise))
  if stochastic and key is None:
    raise UserError("the sampler adds noise, so it needs a key; or use ddim with eta = 0")

  def body(x, now):
    i, t, coefficients = now
    prediction = denoise(x, jnp.full(len(x), t)).astype(x.dtype)
    noise = None
    if stochastic and key is not None:
      noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    return step(coefficients, x, prediction=prediction, noise=noise), None

  indices = np.arange(len(timesteps.t), dtype=np.int32)
  x, _ = jax.lax.scan(body, x_T, (indices, timesteps.t, steps))
  return x / gamma
