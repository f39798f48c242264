"""Compare the schedules with diffusers, and the forward process with float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffdis_jax.config.sections import ImageDiffusion, TextDiffusion
from diffdis_jax.errors import UserError
from diffdis_jax.method import schedules
from tests import steps

DIFFUSERS_NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
T0 = np.array([0, 1, 500, 999], np.int32)


def _normal(seed, shape=(4, 3, 2)):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("name", DIFFUSERS_NAMES)
def test_betas_and_alpha_bar_equal_diffusers(name, scheduler):
  theirs = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=DIFFUSERS_NAMES[name])
  ours = schedules.noise_schedule(name)
  np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), atol=1e-7)
  np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod.numpy(), atol=1e-6)
  assert len(ours.betas) == 1000


@pytest.mark.parametrize("name", steps.ALPHA_BAR)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_equal_their_definition(name, gamma):
  """The weight is 1 where the image is noisier than γ, and γ / SNR where it is not, in float64."""
  weights = schedules.min_snr_weights(schedules.noise_schedule(name), jnp.arange(1000), gamma=gamma)
  want = [min(a / (1 - a), gamma) / (a / (1 - a)) for a in steps.ALPHA_BAR[name].tolist()]
  np.testing.assert_allclose(weights, want, rtol=1e-6)
  assert weights[0] < 0.01 and weights[-1] == 1.0 and weights.dtype == jnp.float32


def test_leading_equals_diffusers_at_every_step_count():
  theirs = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
  for n in range(1, 1000):
    theirs.set_timesteps(n)
    ours = schedules.leading(n)
    np.testing.assert_array_equal(ours.t, theirs.timesteps.numpy())
    np.testing.assert_array_equal(ours.t_prev, np.maximum(ours.t - 1000 // n, 0))


def test_trailing_equals_diffusers_at_every_step_count():
  """For some counts, such as 61, diffusers gives one step too many at t = -1: compare the first n."""
  theirs = DDIMScheduler(timestep_spacing="trailing")
  for n in range(1, 1001):
    theirs.set_timesteps(n)
    ours = schedules.trailing(n)
    np.testing.assert_array_equal(ours.t, theirs.timesteps.numpy()[:n])
    assert len(ours.t) == n and ours.t[0] == 999 and ours.t_prev[-1] == schedules.DATA
    np.testing.assert_array_equal(ours.t_prev[:-1], ours.t[1:])


@pytest.mark.parametrize("name", DIFFUSERS_NAMES)
def test_add_noise_equals_diffusers(name):
  theirs = DDIMScheduler()
  theirs.alphas_cumprod = torch.tensor(schedules.noise_schedule(name).alpha_bar)
  x0, noise = _normal(0), _normal(1)
  want = theirs.add_noise(*(torch.tensor(a, dtype=torch.float64) for a in (x0, noise)), torch.tensor(T0))
  got = schedules.add_noise(ImageDiffusion(schedule=name), jnp.asarray(x0), noise=jnp.asarray(noise), t=jnp.asarray(T0))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want.numpy(), atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("name", DIFFUSERS_NAMES)
def test_the_inverse_undoes_add_noise(name, gamma):
  """Compare with float64, within the precision that f32 leaves of a signal scaled by γ √ᾱ."""
  schedule, process = schedules.noise_schedule(name), TextDiffusion(schedule=name, target="noise", gamma=gamma)
  x0, noise, t = jnp.asarray(_normal(2)), jnp.asarray(_normal(3)), jnp.asarray(T0)
  x_t = schedules.add_noise(process, x0, noise=noise, t=t)
  a = np.sqrt(schedule.alpha_bar[T0])[:, None, None]
  s = np.sqrt(1 - schedule.alpha_bar[T0])[:, None, None]
  np.testing.assert_allclose(x_t, gamma * a * np.float64(x0) + s * np.float64(noise), atol=1e-6)
  data = schedules.to_data(process, x_t, prediction=noise, t=t)
  assert np.all(np.abs(data - x0) * gamma * a < 1e-6)


def test_to_data_reads_both_targets():
  x0, noise, t = jnp.asarray(_normal(4)), jnp.asarray(_normal(5)), jnp.asarray([0, 100, 300, 600])
  for target, prediction in (("data", x0), ("noise", noise)):
    process = TextDiffusion(schedule="linear", target=target, gamma=0.5)
    x_t = schedules.add_noise(process, x0, noise=noise, t=t)
    np.testing.assert_allclose(schedules.to_data(process, x_t, prediction=prediction, t=t), x0, atol=1e-5)
  with pytest.raises(UserError, match="'epsilon'.*data, noise"):
    TextDiffusion(target="epsilon")
