"""Compare every step with diffusers, and γ with the diffusion process of scaled data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffdis_jax.config.sections import TextDiffusion
from diffdis_jax.method import samplers, schedules
from diffdis_jax.method.schedules import Timesteps

NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "data": "sample"}
X, PREDICTION, NOISE = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)


def _theirs(name, target, num_steps, dtype=torch.float64):
  """Make diffusers' scheduler with SD's settings, by default in float64: its f32 tables are off by 1e-5 and more."""
  theirs = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule=NAMES[name],
    clip_sample=False,
    steps_offset=1,
    timestep_spacing="leading",
    prediction_type=PREDICTION_TYPES[target],
    set_alpha_to_one=False,
  )
  if dtype == torch.float64:
    theirs.alphas_cumprod = torch.tensor(schedules.noise_schedule(name).alpha_bar)
    theirs.final_alpha_cumprod, theirs.one = theirs.alphas_cumprod[0], torch.tensor(1.0, dtype=dtype)
  theirs.set_timesteps(num_steps)
  return theirs


def _torch(*arrays, dtype=torch.float64):
  return [torch.tensor(a, dtype=dtype) for a in arrays]


def _assert_close(got, want):
  """Compare up to 1e-6, relative for values over 1: a step may multiply noise by 1 / √ᾱ."""
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def _step(process, t, t_prev, x, prediction):
  """Return x at t_prev after one step."""
  timesteps = Timesteps(t=np.array([t], np.int32), t_prev=np.array([t_prev], np.int32))
  (coefficients,) = samplers.ddim_coefficients(process, timesteps).each()
  return samplers.ddim_step(process, coefficients, jnp.asarray(x), jnp.asarray(prediction)).x_prev


def _run(denoise, x, process, timesteps):
  """Return x_0 by one scan, as in Algorithms 2 and 3."""

  def step(x_t, coefficients):
    return samplers.ddim_step(process, coefficients, x_t, denoise(x_t, jnp.full(len(x_t), coefficients.t))).x_prev, None

  return jax.lax.scan(step, x, samplers.ddim_coefficients(process, timesteps))[0] / process.gamma


def process_of(schedule: str, target: str = "noise", gamma: float = 1.0) -> TextDiffusion:
  """Return a process, by default the one for images."""
  return TextDiffusion(schedule=schedule, target=target, gamma=gamma)


@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_ddim_step_equals_diffusers(name, target):
  process = process_of(schedule=name, target=target)
  for num_steps in (1, 7, 50, 600):
    theirs = _theirs(name, target, num_steps)
    steps = schedules.leading(num_steps)
    for t, t_prev in list(zip(steps.t.tolist(), steps.t_prev.tolist()))[:: max(1, num_steps // 50)] + [(1, 0)]:
      x, prediction = _torch(X, PREDICTION)
      got = _step(process, t, t_prev, X, PREDICTION)
      assert got.dtype == jnp.float32
      _assert_close(got, theirs.step(prediction, t, x).prev_sample.numpy())


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_gamma_is_the_plain_process_of_scaled_data(target):
  """The process is x_t = √ᾱ (γ x_0) + √(1 − ᾱ) ε: diffusers takes the same steps if it gets γ x̂_0."""
  gamma, steps = 0.3, schedules.leading(20)
  theirs = _theirs("linear", target, 20)
  for t, t_prev in zip(steps.t.tolist(), steps.t_prev.tolist()):
    x, prediction = _torch(X, gamma * PREDICTION if target == "data" else PREDICTION)
    got = _step(process_of(schedule="linear", target=target, gamma=gamma), t, t_prev, X, PREDICTION)
    _assert_close(got, theirs.step(prediction, t, x).prev_sample.numpy())


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_a_true_prediction_stays_on_the_marginal_and_names_the_data(target):
  """From known data and noise, DDIM takes x_t to exactly the x_{t_prev} of the same data and noise."""
  process, t, t_prev = process_of(schedule="cosine", target=target, gamma=0.4), 800, 350
  x0, noise = jnp.asarray(X), jnp.asarray(NOISE)

  def at(t):
    return schedules.add_noise(process, x0, noise=noise, t=jnp.full(len(x0), t))

  (coefficients,) = samplers.ddim_coefficients(process, Timesteps(t=np.array([t]), t_prev=np.array([t_prev]))).each()
  got = samplers.ddim_step(process, coefficients, at(t), x0 if target == "data" else noise)
  np.testing.assert_allclose(got.x_prev, at(t_prev), atol=5e-6)
  np.testing.assert_allclose(got.x_0, x0, atol=2e-5)


def _denoise(x, t):
  assert t.shape == (len(x),) and t.dtype == jnp.int32
  return jnp.tanh(x + t[:, None].astype(jnp.float32) / 1000)


def test_whole_ddim_run_equals_diffusers():
  theirs = _theirs("scaled_linear", "noise", 30)
  x = torch.tensor(X, dtype=torch.float64)
  for t in theirs.timesteps:
    x = theirs.step(torch.tanh(x + t / 1000), int(t), x).prev_sample
  got = _run(_denoise, jnp.asarray(X), process_of(schedule="scaled_linear"), schedules.leading(30))
  np.testing.assert_allclose(got, x.numpy(), rtol=1e-5, atol=1e-5)


def test_one_trailing_step_is_the_data_prediction_at_the_last_timestep():
  process = process_of(schedule="cosine", target="data", gamma=0.3)
  (coefficients,) = samplers.ddim_coefficients(process, schedules.trailing(1)).each()
  assert coefficients.t == 999
  got = samplers.ddim_step(process, coefficients, jnp.asarray(X), jnp.asarray(PREDICTION))
  np.testing.assert_array_equal(got.x_0, PREDICTION)
  np.testing.assert_allclose(got.x_prev / process.gamma, PREDICTION, rtol=1e-6)
