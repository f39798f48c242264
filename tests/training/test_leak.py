"""How much of its caption a training step's noised query e_t gives away by itself, without the image.

The best that can be made of e_t alone is the matched filter, argmax_j ⟨e_t, e_j⟩. For n captions of orthonormal e
the scores are independent normal ones, and the own one's mean is d = γ √ᾱ / √(1 − ᾱ), so that the filter is right with
probability ∫ φ(x) Φ(x + d)^(n−1) dx: 11 % of the time for 1024 captions under `scaled_linear` at γ = 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import linalg, special

from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.structs import LatentBatch, TextCondition
from diffdis_jax.training.step import step_keys
from tests import steps

N = 1024
STEPS = 4
BUCKETS = 10
# Share of captions that e_t tells, over all timesteps: as docs/method.md has it, and of the default config.
RATES = {
  ("scaled_linear", 1.0): 0.11,
  ("cosine", 1.0): 0.21,
  ("scaled_linear", 0.3): 0.016,
  ("cosine", 0.3): 0.06,
}


def predicted(schedule: str, gamma: float) -> np.ndarray:
  """Probability by timestep that the matched filter is right."""
  alpha_bar = steps.ALPHA_BAR[schedule]
  d = gamma * np.sqrt(alpha_bar / (1 - alpha_bar))
  x, dx = np.linspace(-9, 9, 721, retstep=True)
  density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * dx
  return np.exp((N - 1) * special.log_ndtr(x + d[:, None])) @ density


def numbered_captions(config: Any) -> LatentBatch:
  """N captions of two words, which are their numbers."""
  i = np.arange(N)
  tokens = np.full((N, config.data.max_length), steps.EOS, np.int32)
  tokens[:, 0], tokens[:, 1], tokens[:, 2] = steps.BOS, i // steps.BOS, i % steps.BOS
  latent = np.zeros((N, 4, 4, 4), ml_dtypes.bfloat16)
  return LatentBatch(mean=latent, log_variance=latent, tokens=tokens)


def orthonormal(self: DiffDis, tokens: jax.Array) -> TextCondition:
  """Make e of the numbered captions a row of Hadamard's matrix each."""
  rows = jnp.asarray(linalg.hadamard(N), jnp.float32)[(tokens[:, 1] * steps.BOS + tokens[:, 2]) % N]
  c = jnp.zeros((*tokens.shape, N)).at[:, 3].set(rows)
  return self.text_encoder.with_query(c.astype(self.text_encoder.dtype), tokens)


@pytest.mark.parametrize("schedule, gamma", RATES)
def test_e_t_tells_its_caption_as_often_as_noise_of_its_timestep_allows(monkeypatch, schedule, gamma):
  changes = {"text_diffusion.schedule": schedule, "text_diffusion.gamma": gamma, "batch_size": N}
  changes |= {"model.text_encoder.width": N, "loss.image_dropout": 0.0}
  config = steps.make_config("discrimination", **changes)
  loss, batch = steps.Loss(config, trained="^$"), numbered_captions(config)
  seen = {}

  def hand_through(self: DiffDis, **inputs: jax.Array) -> jax.Array:
    seen.update(inputs)
    return inputs["e_t"]

  monkeypatch.setattr(DiffDis, "discrimination", hand_through)
  monkeypatch.setattr(DiffDis, "encode_text", orthonormal)

  def train(batch, step):
    _, metrics = loss({}, batch, step_keys(config.seed, step, jnp.int32(0)))
    return seen["e_t"], seen["t_e"], metrics["alignment_accuracy"]

  run = jax.jit(train)
  e = linalg.hadamard(N) / np.sqrt(N)
  right, timesteps = [], []
  for step in range(STEPS):
    e_t, t_e, accuracy = jax.device_get(run(batch, jnp.int32(step)))
    right.append(np.argmax(e_t @ e.T, axis=1) == np.arange(N))
    timesteps.append(t_e)
    # A network that hands its query through scores no more than that: the loss has no other way to a caption.
    assert abs(accuracy.total - right[-1].mean()) < 1.5 / N
  right, t_e = np.concatenate(right), np.concatenate(timesteps)
  assert len(np.unique(t_e)) > 900

  by_timestep = predicted(schedule, gamma)
  assert by_timestep.mean() == pytest.approx(RATES[schedule, gamma], rel=0.05)
  bucket = t_e * BUCKETS // steps.NUM_TIMESTEPS
  for rows in (np.ones_like(right), *(bucket == i for i in range(BUCKETS))):
    p = by_timestep[t_e[rows]]
    error = right[rows].sum() - p.sum()
    assert abs(error) < 4 * np.sqrt((p * (1 - p)).sum()) + 1, f"{right[rows].mean():.3f}, not {p.mean():.3f}"
