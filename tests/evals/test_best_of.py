"""The best of several images against every one of them ranked by itself, and those that rank lowest."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals.best_of import BestOf, check_failures, similarity
from diffdis_jax.inference import Inference
from diffdis_jax.method import algorithms, encode, samplers, schedules
from diffdis_jax.method.step_noise import query_noise
from tests import steps, tiny
from tests.models.networks import random_params

PROMPTS = ("a red star", "a blue ring", "a red star", "a green square", "a white dot")
STEPS, SEED = 4, 5


@pytest.fixture(scope="module")
def model() -> tuple[Inference, dict]:
  config = tiny.get_config()
  made = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=4)
  return made, random_params(made.shapes, seed=0)


def tokens_of(inference) -> np.ndarray:
  return Tokenizer(inference.max_length)(PROMPTS)


def candidates(inference, params, count):
  """Images [n k H W 3] and scores [n k] of every candidate, each generated and ranked on its own."""
  tokens, noise = tokens_of(inference), BestOf(inference, count).noise(len(PROMPTS), SEED)
  images = np.stack([inference.generate(params, tokens, noise[:, k]) for k in range(count)], axis=1)
  e = inference.embed_texts(params, tokens)
  scores = [(inference.embed_images(params, images[:, k], seed=0) * e).sum(1) for k in range(count)]
  return images, np.stack(scores, axis=1)


def test_the_best_of_three_is_the_best_of_all_three(model):
  inference, params = model
  images, scores = candidates(inference, params, 3)
  best = BestOf(inference, 3)
  found = best.generate(params, tokens_of(inference), best.noise(len(PROMPTS), SEED))
  chosen = scores.argmax(axis=1)
  np.testing.assert_array_equal(found, images[np.arange(len(PROMPTS)), chosen])
  assert len({*chosen}) > 1 and best.generation_protocol["best_of"] == 3 and best.generation_protocol["best_at"] == 1.0
  # Two of the prompts are the same, and their images are not.
  assert [ranked.prompt for ranked in best.lowest] == [PROMPTS[i] for i in scores.max(axis=1).argsort()]
  np.testing.assert_allclose([ranked.score for ranked in best.lowest], np.sort(scores.max(axis=1)), atol=1e-6)


def test_the_best_of_one_is_what_there_was(model):
  inference, params = model
  tokens, noise, one = tokens_of(inference), inference.noise(5, SEED), BestOf(inference)
  np.testing.assert_array_equal(one.noise(5, SEED), noise)
  np.testing.assert_array_equal(BestOf(inference, 3).noise(5, SEED)[:, 0], noise)
  np.testing.assert_array_equal(BestOf(inference, 3).noise(2, SEED, first=3), BestOf(inference, 3).noise(5, SEED)[3:])
  assert one.noise_shape() == noise.shape[1:] and BestOf(inference, 3).noise_shape() == (3, *noise.shape[1:])
  assert one.generation_protocol == inference.generation_protocol
  np.testing.assert_array_equal(one.generate(params, tokens, noise), inference.generate(params, tokens, noise))
  sampled = BestOf(inference, 4).noise(64, SEED).reshape(64, 4, -1)
  assert abs(np.corrcoef(sampled.transpose(1, 0, 2).reshape(4, -1)) - np.eye(4)).max() < 0.05  # as if independent


def halfway_scores(inference, params, tokens, noise, begun):
  """⟨ê_0, e⟩ [n k] after `begun` steps of a plain loop: of ẑ_0, read as clean."""
  network, how = inference.network, inference.sampling
  coefficients = [*samplers.ddim_coefficients(network.image_process, schedules.leading(STEPS)).each()]

  @jax.jit
  def step(params, z, now):
    module = network.with_params(params)
    text, null = module.encode_text(jnp.asarray(tokens)), encode.null_condition(module, tokens.shape[1])
    settings = dict(c=text.c, c_null=null, network=network, guidance_scale=how.generation_guidance)
    taken = algorithms.generation_step(module, z, now, **settings)
    return taken.z_prev, taken.z_0

  @jax.jit
  def scores(params, z):
    module = network.with_params(params)
    e_T = query_noise(
      jax.random.key(0), num_noise_samples=1, places=jnp.arange(len(tokens)), width=network.model.query_width
    )
    query = algorithms.denoise_text_query(
      module,
      z,
      e_T,
      network=network,
      steps=1,
      guidance_scale=1.0,
      normalize_query=True,
    )
    return (query * module.encode_text(jnp.asarray(tokens)).e).sum(1)

  found = []
  for k in range(noise.shape[1]):
    z = jnp.asarray(noise[:, k])
    for now in coefficients[:begun]:
      z, z_0 = step(params, z, now)
    found.append(scores(params, z_0))
  return np.stack(found, axis=1)


@pytest.mark.parametrize(("best_at", "begun"), [(0.5, 2), (0.1, 1)])
def test_half_way_the_best_of_three_is_finished(model, best_at, begun, caplog):
  inference, params = model
  images, _ = candidates(inference, params, 3)
  early, tokens = BestOf(inference, 3, best_at), tokens_of(inference)
  noise = early.noise(len(PROMPTS), SEED)
  chosen = halfway_scores(inference, params, tokens, noise, begun).argmax(axis=1)
  found = early.generate(params, tokens, noise)
  expected = images[np.arange(len(PROMPTS)), chosen]
  assert abs(found.astype(int) - expected).max() <= 1 and (found != expected).mean() < 0.01  # two programs for one
  assert early.generation_protocol["best_at"] == begun / STEPS
  assert "the head was trained on clean images" in caplog.text


@pytest.mark.parametrize("best_at", [1.0, 0.5])
def test_two_calls_choose_as_one_where_images_have_the_same_places(model, best_at):
  inference, params = model
  tokens, two = tokens_of(inference), BestOf(inference, 3, best_at)
  noise, parts = two.noise(len(PROMPTS), SEED), (slice(3), slice(3, None))
  expected = np.concatenate([two.generate(params, tokens[rows], noise[rows]) for rows in parts])
  one = BestOf(inference, 3, best_at)
  places = np.array([0, 1, 2, 0, 1])
  np.testing.assert_array_equal(one.generate(params, tokens, noise, places=places), expected)
  assert [ranked.score for ranked in one.lowest] == pytest.approx([ranked.score for ranked in two.lowest])


def test_the_similarity_is_of_an_image_and_its_own_prompt(model):
  inference, params = model
  images = inference.generate(params, tokens_of(inference), inference.noise(len(PROMPTS), SEED))
  q, e = inference.embed_images(params, images, seed=0), inference.embed_texts(params, tokens_of(inference))
  np.testing.assert_allclose(similarity(inference, params, images, tokens_of(inference)), np.diag(q @ e.T), atol=1e-6)


def test_those_that_rank_lowest_are_shown(model, tmp_path):
  inference, params = model
  best = BestOf(inference)
  noise = inference.noise(len(PROMPTS), SEED)
  for rows in (slice(3), slice(3, None)):  # in chunks, as generate has them
    best.generate(params, tokens_of(inference)[rows], noise[rows])
  assert len(best.lowest) == 5 and best.lowest == sorted(best.lowest, key=lambda ranked: ranked.score)
  best.write_lowest(str(tmp_path / "F.png"))
  with Image.open(tmp_path / "F.png") as grid:
    first = np.asarray(grid)[8:136, 8:136]
  np.testing.assert_array_equal(first[::8, ::8], best.lowest[0].image)
  BestOf(inference).write_lowest(str(tmp_path / "none.png"))
  assert [path.name for path in tmp_path.iterdir()] == ["F.png"]


def test_what_is_refused(model, tmp_path):
  inference, _ = model
  for settings in (dict(best_of=0), dict(best_of=65), dict(best_at=0.0), dict(best_at=1.5), dict(best_at=0.5)):
    with pytest.raises(UserError, match="best_"):
      BestOf(inference, **settings)
  with pytest.raises(UserError, match="has no trained head"):
    BestOf(types.SimpleNamespace(aligned=False), 4)
  with pytest.raises(UserError, match=r"--failures=F.jpg should name the picture to write"):
    check_failures("F.jpg")
  with pytest.raises(UserError, match="--failures=.*F.png lies in no folder that exists"):
    check_failures(f"{tmp_path}/none/F.png")
