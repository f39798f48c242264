"""Test the measurement of how much a network reads e_t, on two known networks, and against zero_shot's accuracy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import prompts, query_use
from diffdis_jax.evals.zero_shot import ZeroShot
from diffdis_jax.method.diffdis import DiffDis
from tests import steps
from tests.untrained import run as run


def data_of(run: str) -> dict[str, Any]:
  section = run_config.load(run).evals["few"]["data"]
  return {name: value for name, value in section.items() if name != "num_images"}


@pytest.fixture
def measure(run):
  def measure_run(task=query_use.QueryUse):
    model, params = inference.load(run, batch_size=32)
    return task(data=data_of(run), num_images=32).run(model, params)

  return measure_run


def test_a_network_that_returns_its_input_follows_the_input(measure, monkeypatch):
  monkeypatch.setattr(DiffDis, "discrimination", lambda self, *, e_t, t_e, z, t_z, c_null: e_t)
  metrics = measure()
  for t in query_use.AT:
    for length in (0.3, 1, 3):
      assert metrics[f"acc1_true_{length:g}_t{t}"] == 1 and metrics[f"acc1_wrong_{length:g}_t{t}"] == 0
  assert metrics["acc1_by_input"] == 1 and abs(metrics["cosine_of_two_draws"]) < 0.2


def test_the_loss_is_the_cross_entropy_of_training_s_e_t(measure, run, monkeypatch):
  """The network returns its input e_t = γ √ᾱ e + √(1 − ᾱ) ε as its prediction of e."""
  monkeypatch.setattr(DiffDis, "discrimination", lambda self, *, e_t, t_e, z, t_z, c_null: e_t)
  metrics, settings = measure(), run_config.load(run)
  assert settings.text_diffusion.target == "data"
  model, params = inference.load(run, batch_size=32)
  task = query_use.QueryUse(data=data_of(run), num_images=32)
  texts = [prompts.fill(task.single, name) for name in task.names]
  e = model.embed_texts(params, Tokenizer(model.max_length)(texts))
  keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), place) for place in range(32)]
  epsilon = np.stack([jax.random.normal(key, (e.shape[1],)) for key in keys])
  alpha_bar = steps.ALPHA_BAR[settings.text_diffusion.schedule]
  for t in query_use.TIMESTEPS:
    e_t = settings.text_diffusion.gamma * np.sqrt(alpha_bar[t]) * e[task.labels] + np.sqrt(1 - alpha_bar[t]) * epsilon
    logits = np.exp(float(params["logit_scale"])) * (e_t / np.linalg.norm(e_t, axis=1, keepdims=True)) @ e.T
    expected = special.logsumexp(logits, axis=1) - logits[np.arange(32), task.labels]
    assert metrics[f"loss_noised_t{t}"] == pytest.approx(expected.mean(), rel=1e-4)


def test_a_network_that_reads_only_the_image_ignores_the_input(measure, monkeypatch):
  def from_image(self, *, e_t, t_e, z, t_z, c_null):
    flat = z.reshape(len(z), -1).astype(jnp.float32)
    return jnp.resize(flat, (len(z), e_t.shape[1])) + 0.1

  monkeypatch.setattr(DiffDis, "discrimination", from_image)
  metrics = measure()
  assert metrics["acc1_by_input"] == 0 and metrics["cosine_of_two_draws"] == pytest.approx(1, abs=1e-5)
  assert len({round(value, 6) for name, value in metrics.items() if name.startswith("acc1_") and "by" not in name}) == 1
  assert np.ptp([value for name, value in metrics.items() if name.startswith("loss_")]) < 1e-5


@pytest.mark.slow
def test_noise_at_the_last_timestep_has_the_accuracy_of_zero_shot(measure):
  metrics, expected = measure(), measure(ZeroShot)["acc1_single_template"]
  assert metrics["acc1_noise_t999"] == metrics["acc1_steps_1"] == expected
