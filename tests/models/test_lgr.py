"""Compare the language-guided head with torch, class by class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffdis_jax.common.params import flatten
from diffdis_jax.method import network as build
from diffdis_jax.models import lgr
from tests.models.networks import Network, random_params, relative_error

D, CLASSES, ANCHORS, B = 12, 5, 4, 3
RNG = np.random.default_rng(0)


def make(rngs):
  return lgr.LanguageGuidedHead(width=D, classes=CLASSES, anchors=ANCHORS, rngs=rngs)


NETWORK = Network.of(make)
BRANCHES = NETWORK.jit(lambda head, *args: head(*args))
COUNTS = (4, 2, 4, 1, 3)  # sentences of each class


@pytest.fixture(scope="module")
def params():
  params = random_params(NETWORK.shapes, seed=0)
  for label, count in enumerate(COUNTS):
    params["anchors"][label, count:] = 0.0
  return params


def by_torch(params, f, logit_scale):
  """Compute both branches in f64."""
  p = {path: torch.tensor(value, dtype=torch.float64) for path, value in params.items()}
  f = torch.tensor(f, dtype=torch.float64)
  visual = F.relu(f @ p["fc1.kernel"] + p["fc1.bias"]) @ p["fc2.kernel"] + p["fc2.bias"]
  norm = lambda x, name: F.layer_norm(x, (D,), p[f"{name}.norm.scale"], p[f"{name}.norm.bias"], eps=1e-5)
  query = norm(f, "query_norm") @ p["q.kernel"]
  language = []
  for label, count in enumerate(COUNTS):
    sentences = p["anchors"][label, :count]
    keys = norm(sentences, "key_norm") @ p["k.kernel"]
    g = F.scaled_dot_product_attention(query[None], keys[None], sentences[None])[0]
    language.append(np.exp(logit_scale) * F.cosine_similarity(f, g, dim=-1))
  return visual, torch.stack(language, dim=1)


def test_both_branches_equal_torchs(params):
  f, scale = RNG.standard_normal((B, D)).astype(np.float32) * 3, np.float32(4.9)
  ours = BRANCHES(params, f, scale)
  visual, language = by_torch(params, f, scale)
  assert relative_error(ours.visual, visual) < 1e-6 and relative_error(ours.language, language) < 1e-6


def test_padding_takes_no_attention_from_an_only_sentence(params):
  """Even if padding's score were larger by a hundred, softmax must leave attention to the sentence."""
  f, scale, only = RNG.standard_normal((B, D)).astype(np.float32), np.float32(1.0), COUNTS.index(1)
  ours = BRANCHES({**params, "q.kernel": 1000 * params["q.kernel"]}, f, scale).language[:, only]
  expected = np.exp(scale) * F.cosine_similarity(*map(torch.tensor, (f, params["anchors"][only, :1])), dim=-1)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_new_head_attends_by_likeness_alone():
  start = flatten(build.initial_state(make, jax.random.key(1)))
  for name in ("q", "k"):
    np.testing.assert_array_equal(start[f"{name}.kernel"], np.eye(D))
  for name in ("query_norm.norm.scale", "key_norm.norm.scale"):
    assert (start[name] == 1).all()
  assert not any(start[path].any() for path in start if path.endswith("bias") or path == "anchors")
  assert {path for path in start if path.endswith("bias")} == {
    *("fc1.bias", "fc2.bias", "query_norm.norm.bias", "key_norm.norm.bias")
  }
  wide = flatten(
    build.initial_state(
      lambda rngs: lgr.LanguageGuidedHead(width=96, classes=64, anchors=1, rngs=rngs), jax.random.key(0)
    )
  )
  for path in ("fc1.kernel", "fc2.kernel"):
    kernel = np.asarray(wide[path], np.float64)
    assert abs(kernel.std() / 0.02 - 1) < 0.02 and abs(kernel.mean()) < 5e-4
    assert abs((kernel**4).mean() / kernel.std() ** 4 - 3) < 0.15 and abs(kernel).max() < 2


def test_the_prediction_mixes_probabilities():
  logits = RNG.standard_normal((2, B, CLASSES)).astype(np.float32)
  ours = lgr.mixed_prediction(jnp.asarray(logits), 0.2)
  visual, language = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
  assert relative_error(ours, 0.2 * visual + 0.8 * language) < 1e-6
