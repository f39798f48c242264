"""Every step against diffusers, γ against the process it belongs to, the loop against its steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffdis_jax.errors import UserError
from diffdis_jax.method import samplers, schedules

NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "data": "sample"}
X, PREDICTION, NOISE = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)


def _theirs(cls, name, target, num_steps, dtype=torch.float64, **kwargs):
  """diffusers' scheduler with SD's settings; in float64 unless told, since its own f32 tables are 1e-5 off and more."""
  theirs = cls(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule=NAMES[name],
    clip_sample=False,
    steps_offset=1,
    timestep_spacing="leading",
    prediction_type=PREDICTION_TYPES[target],
    **kwargs,
  )
  if dtype == torch.float64:
    theirs.alphas_cumprod = torch.tensor(schedules.noise_schedule(name).alpha_bar)
    theirs.final_alpha_cumprod, theirs.one = theirs.alphas_cumprod[0], torch.tensor(1.0, dtype=dtype)
  theirs.set_timesteps(num_steps)
  return theirs


def _torch(*arrays, dtype=torch.float64):
  return [torch.tensor(a, dtype=dtype) for a in arrays]


def _assert_close(got, want):
  """1e-6, relative for values over 1: a step may multiply noise by 1 / √ᾱ."""
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_ddim_step_equals_diffusers(name, target, eta):
  schedule = schedules.noise_schedule(name)
  for num_steps in (1, 7, 50, 600):
    theirs = _theirs(DDIMScheduler, name, target, num_steps, set_alpha_to_one=False)
    steps = schedules.leading(num_steps)
    for t, t_prev in list(zip(steps.t.tolist(), steps.t_prev.tolist()))[:: max(1, num_steps // 50)] + [(1, 0)]:
      x, prediction, noise = _torch(X, PREDICTION, NOISE)
      want = theirs.step(prediction, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
      ours = samplers.ddim(schedule, t=t, t_prev=t_prev, target=target, eta=eta)
      got = samplers.step(ours, jnp.asarray(X), prediction=jnp.asarray(PREDICTION), noise=jnp.asarray(NOISE))
      assert got.dtype == jnp.float32
      _assert_close(got, want.numpy())


@pytest.mark.parametrize("num_steps", [7, 50])
def test_stable_diffusions_step_equals_diffusers_in_f32(num_steps):
  theirs = _theirs(DDIMScheduler, "scaled_linear", "noise", num_steps, torch.float32, set_alpha_to_one=False)
  steps = schedules.leading(num_steps)
  for t, t_prev in zip(steps.t.tolist(), steps.t_prev.tolist()):
    x, prediction = _torch(X, PREDICTION, dtype=torch.float32)
    ours = samplers.ddim(schedules.noise_schedule("scaled_linear"), t=t, t_prev=t_prev, target="noise")
    got = samplers.step(ours, jnp.asarray(X), prediction=jnp.asarray(PREDICTION))
    _assert_close(got, theirs.step(prediction, t, x).prev_sample.numpy())


@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_ddpm_step_equals_diffusers(name, target):
  schedule = schedules.noise_schedule(name)
  for num_steps in (1, 7, 50):
    theirs = _theirs(DDPMScheduler, name, target, num_steps, variance_type="fixed_small")
    steps = schedules.leading(num_steps)
    for t, t_prev in zip(steps.t.tolist(), [*steps.t_prev[:-1].tolist(), schedules.DATA]):
      x, prediction = _torch(X, PREDICTION)
      noise = torch.randn(X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
      want = theirs.step(prediction, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
      ours = samplers.ddpm(schedule, t=t, t_prev=t_prev, target=target)
      noise = jnp.asarray(noise.numpy(), jnp.float32)
      _assert_close(samplers.step(ours, jnp.asarray(X), prediction=jnp.asarray(PREDICTION), noise=noise), want.numpy())


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_gamma_is_the_plain_process_of_scaled_data(target):
  """x_t = √ᾱ (γ x_0) + √(1 − ᾱ) ε: diffusers, told γ x̂_0, steps the same."""
  gamma, steps = 0.3, schedules.leading(20)
  theirs = _theirs(DDIMScheduler, "linear", target, 20, set_alpha_to_one=False)
  for t, t_prev in zip(steps.t.tolist(), steps.t_prev.tolist()):
    x, prediction, noise = _torch(X, gamma * PREDICTION if target == "data" else PREDICTION, NOISE)
    want = theirs.step(prediction, t, x, eta=0.5, variance_noise=noise).prev_sample
    ours = samplers.ddim(schedules.noise_schedule("linear"), t=t, t_prev=t_prev, target=target, gamma=gamma, eta=0.5)
    got = samplers.step(ours, jnp.asarray(X), prediction=jnp.asarray(PREDICTION), noise=jnp.asarray(NOISE))
    _assert_close(got, want.numpy())


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_a_true_prediction_stays_on_the_marginal(target):
  """From x_t of known data and noise, DDIM gives exactly x_{t_prev} of the same two."""
  schedule, gamma, t, t_prev = schedules.noise_schedule("cosine"), 0.4, 800, 350
  x0, noise = jnp.asarray(X), jnp.asarray(NOISE)

  def at(t):
    return schedules.add_noise(schedule, x0, noise=noise, t=jnp.full(len(x0), t), gamma=gamma)

  ours = samplers.ddim(schedule, t=t, t_prev=t_prev, target=target, gamma=gamma)
  got = samplers.step(ours, at(t), prediction=x0 if target == "data" else noise)
  np.testing.assert_allclose(got, at(t_prev), atol=5e-6)


@pytest.mark.parametrize("method, kwargs", [("ddim", {"eta": 0.7}), ("ddpm", {})])
def test_stochastic_steps_keep_the_marginal_variance(method, kwargs):
  """For data N(0, 1) all marginals are N(0, 1) and E[ε | x_t] = √(1 − ᾱ) x_t: 1000 steps keep variance 1."""
  schedule, steps, variance = schedules.noise_schedule("linear"), schedules.trailing(1000), 1.0
  coefficients = {"ddim": samplers.ddim, "ddpm": samplers.ddpm}[method]
  for t, t_prev in zip(steps.t, steps.t_prev):
    c = coefficients(schedule, t=t, t_prev=t_prev, target="noise", **kwargs)
    variance = (c.x_t + c.prediction * np.sqrt(1 - schedule.alpha_bar[t])) ** 2 * variance + c.noise**2
  np.testing.assert_allclose(variance, 1.0, atol=2e-2)


def _loop(denoise, x, steps, schedule, target, gamma, method, eta, key):
  for i, (t, t_prev) in enumerate(zip(steps.t.tolist(), steps.t_prev.tolist())):
    if method == "ddpm":
      c = samplers.ddpm(
        schedule, t=t, t_prev=t_prev if i + 1 < len(steps.t) else schedules.DATA, target=target, gamma=gamma
      )
    else:
      c = samplers.ddim(schedule, t=t, t_prev=t_prev, target=target, gamma=gamma, eta=eta)
    noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
    x = samplers.step(c, x, prediction=denoise(x, jnp.full(len(x), t)), noise=noise)
  return x / gamma


def _denoise(x, t):
  assert t.shape == (len(x),) and t.dtype == jnp.int32
  return jnp.tanh(x + t[:, None].astype(jnp.float32) / 1000)


@pytest.mark.parametrize("spacing", [schedules.leading, schedules.trailing])
@pytest.mark.parametrize("target, gamma", [("data", 0.3), ("noise", 1.0)])
@pytest.mark.parametrize("method, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
def test_sample_equals_its_steps_in_a_row(method, eta, target, gamma, spacing):
  schedule, steps, key = schedules.noise_schedule("scaled_linear"), spacing(6), jax.random.key(3)
  kwargs = dict(schedule=schedule, timesteps=steps, method=method, target=target, gamma=gamma, eta=eta)
  run = jax.jit(lambda x, key: samplers.sample(_denoise, x, key=key, **kwargs))
  got = run(jnp.asarray(X), key)
  want = _loop(_denoise, jnp.asarray(X), steps, schedule, target, gamma, method, eta, key)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
  other = run(jnp.asarray(X), jax.random.key(4))
  assert (method == "ddim" and eta == 0) == bool(jnp.allclose(got, other))


def test_whole_ddim_run_equals_diffusers():
  theirs = _theirs(DDIMScheduler, "scaled_linear", "noise", 30, set_alpha_to_one=False)
  x = torch.tensor(X, dtype=torch.float64)
  for t in theirs.timesteps:
    x = theirs.step(torch.tanh(x + t / 1000), int(t), x).prev_sample
  schedule, steps = schedules.noise_schedule("scaled_linear"), schedules.leading(30)
  got = samplers.sample(_denoise, jnp.asarray(X), schedule=schedule, timesteps=steps, target="noise")
  np.testing.assert_allclose(got, x.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_one_trailing_step_is_the_data_prediction_at_the_last_timestep(method):
  seen = []

  def denoise(x, t):
    jax.debug.callback(lambda t: seen.append(t), t)
    return jnp.asarray(PREDICTION)

  got = samplers.sample(
    denoise,
    jnp.asarray(X),
    schedule=schedules.noise_schedule("cosine"),
    timesteps=schedules.trailing(1),
    method=method,
    target="data",
    gamma=0.3,
  )
  jax.effects_barrier()
  np.testing.assert_allclose(got, PREDICTION, rtol=1e-6)
  np.testing.assert_array_equal(seen, [[999, 999]])


def test_sample_is_one_scan():
  """The network is in the program once, whatever the number of steps."""
  kwargs = dict(schedule=schedules.noise_schedule("linear"), timesteps=schedules.trailing(50), target="data", gamma=0.3)
  program = str(jax.make_jaxpr(lambda x: samplers.sample(_denoise, x, **kwargs))(jnp.asarray(X)))
  assert program.count("tanh") == 1 and program.count("scan[") == 1


def test_half_precision_predictions_keep_the_state_in_f32():
  def half(x, t):
    return _denoise(x, t).astype(jnp.bfloat16)

  kwargs = dict(schedule=schedules.noise_schedule("linear"), timesteps=schedules.leading(3), target="noise")
  assert samplers.sample(half, jnp.asarray(X), **kwargs).dtype == jnp.float32


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(method="euler"), "'euler'; use one of ddim, ddpm"),
    (dict(target="velocity"), "'velocity'.*data, noise"),
    (dict(eta=-0.5), "eta is -0.5"),
    (dict(eta=1.5), "eta is 1.5"),
    (dict(eta=0.5), "needs a key"),
    (dict(method="ddpm"), "needs a key"),
  ],
)
def test_bad_arguments(kwargs, message):
  arguments = dict(schedule=schedules.noise_schedule("linear"), timesteps=schedules.leading(5), target="noise") | kwargs
  with pytest.raises(UserError, match=message):
    samplers.sample(_denoise, jnp.asarray(X), **arguments)
