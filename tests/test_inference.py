from __future__ import annotations

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffdis_jax.common.params import Params
from diffdis_jax.errors import UserError
from diffdis_jax.inference import Inference, load
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.preflight import hlo
from diffdis_jax.run import checkpoint, workdir
from diffdis_jax.structs import TrainState
from tests import steps
from tests.models.networks import random_params

BATCH = steps.make_batch(steps.make_config())
WIDTH = 16  # of a text query


def make(*objectives: str, changes: dict | None = None, **protocol) -> Inference:
  protocol = {"batch_size": 4, **protocol}
  return steps.make_inference(steps.make_config(*objectives, **(changes or {})), mesh=steps.make_mesh(), **protocol)


def params_of(inference: Inference) -> Params:
  return random_params(inference.shapes, seed=0)


def model_of(inference: Inference) -> DiffDis:
  return inference.network.with_params(params_of(inference))


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def query_noise(n: int, *, seed: int, draw: int = 0) -> np.ndarray:
  """Return e_T of n images, which depends only on the seed, the draw and the image's place."""
  key = jax.random.fold_in(jax.random.key(seed), draw)
  return np.stack([jax.random.normal(jax.random.fold_in(key, i), (WIDTH,)) for i in range(n)])


@pytest.fixture(scope="module")
def inference() -> Inference:
  return make(generation_steps=3, generation_guidance=2.0)


def test_the_query_starts_from_pure_noise(monkeypatch):
  def returns_its_input(self, *, e_t, t_e, z, t_z, c_null):
    null = self.encode_text(jnp.asarray([[steps.BOS] + [steps.EOS] * 7])).c
    is_first_step = (t_e == 999) & (t_z == 1000) & (jnp.abs(c_null - null) < 1e-5).all(axis=(1, 2))
    return jnp.where(is_first_step[:, None], e_t, jnp.nan)

  monkeypatch.setattr(DiffDis, "discrimination", returns_its_input)
  inference = make(batch_size=64)
  images = np.tile(BATCH.image, (24, 1, 1, 1))
  queries = inference.embed_images(params_of(inference), images, seed=5)
  noise = query_noise(len(images), seed=5)
  np.testing.assert_allclose(queries, unit(noise), atol=1e-6)
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
  covariance = np.cov(noise.T)
  assert np.abs(covariance - np.eye(WIDTH)).max() < 0.3


def test_image_queries_depend_on_seed_and_place_but_not_on_batches(inference):
  params, images = params_of(inference), BATCH.image[:10]
  embed = functools.partial(inference.embed_images, params)
  queries = embed(images, seed=3)
  assert queries.shape == (10, WIDTH) and queries.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(make(batch_size=7).embed_images(params, images, seed=3), queries, atol=1e-5)
  np.testing.assert_array_equal(embed(images[:5], seed=3), queries[:5])
  np.testing.assert_array_equal(embed(images, seed=3), queries)
  assert np.abs(embed(images, seed=4) - queries).max(axis=1).min() > 1e-4
  twice = embed(np.repeat(images[:1], 2, axis=0), seed=3)
  assert np.abs(twice[0] - twice[1]).max() > 1e-4, "each place has noise of its own"
  other = embed(images[::-1], seed=3)
  assert np.abs(other[:5] - queries[:5]).max(axis=1).min() > 1e-4, "each image has a query of its own"


def test_each_1024_images_have_their_own_key_for_any_batches(inference, monkeypatch):
  """Results stay equal to earlier ones, for which each 1,024 images were embedded in a separate call."""
  monkeypatch.setattr("diffdis_jax.inference.ONE_SEED", 6)
  params, images = params_of(inference), BATCH.image[:10]
  queries = inference.embed_images(params, images, seed=3)
  apart = [inference.embed_images(params, part, seed=seed) for part, seed in ((images[:6], 3), (images[6:], 9))]
  np.testing.assert_allclose(queries, np.concatenate(apart), atol=1e-5)


@pytest.mark.parametrize("target, normalize_query", [("noise", True), ("data", True), ("data", False)])
def test_queries_of_several_steps_samples_and_guidance_equal_ddim(target, normalize_query):
  """With the target "data", ê_0 is normalised after guidance and before it is fed back, unless that is off."""
  s, gamma, schedule = 2.5, 0.4, "cosine"
  changes = {"text_diffusion.target": target, "text_diffusion.gamma": gamma, "text_diffusion.schedule": schedule}
  inference = make(
    "discrimination", changes=changes, steps=3, num_noise_samples=2, guidance=s, normalize_query=normalize_query
  )
  assert inference.protocol["normalize_query"] is (normalize_query and target == "data")
  images, n = BATCH.image[:3], 3
  model = model_of(inference)
  z = jax.jit(model.encode_image)(images)
  c_null = np.repeat(jax.jit(model.encode_text)(model.text_encoder.null_tokens(8)).c, n, axis=0)
  t_z = jnp.full(n, 1000, jnp.int32)
  predict = jax.jit(lambda e_t, t_e, z: model.discrimination(e_t=e_t, t_e=t_e, z=z, t_z=t_z, c_null=c_null))

  alpha_bar = steps.ALPHA_BAR[schedule]
  draws, lengths = [], []
  for draw in range(2):
    e_t = query_noise(n, seed=9, draw=draw)
    for t, t_prev in ((999, 666), (666, 332), (332, None)):
      t_e = np.full(n, t, np.int32)
      signal, sigma = gamma * np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
      unconditional, conditional = (np.asarray(predict(e_t, t_e, latent)) for latent in (np.zeros_like(z), z))
      prediction = unconditional + s * (conditional - unconditional)
      if target == "noise":
        epsilon, data = prediction, (e_t - sigma * prediction) / signal
      else:
        data = unit(prediction) if normalize_query else prediction
        epsilon = (e_t - signal * data) / sigma
      lengths.append(np.linalg.norm(data, axis=-1))
      prev = 1.0 if t_prev is None else alpha_bar[t_prev]
      e_t = (gamma * np.sqrt(prev) * data + np.sqrt(1 - prev) * epsilon).astype(np.float32)
    draws.append(unit(data))
  assert np.allclose(lengths, 1, atol=1e-5) == (normalize_query and target == "data")
  queries = inference.embed_images(params_of(inference), images, seed=9)
  np.testing.assert_allclose(queries, unit(np.mean(draws, axis=0)), atol=2e-4)


def test_generation_equals_ddim_with_guidance(inference):
  s, n = 2.0, 3
  tokens, noise = BATCH.tokens[:n], inference.noise(n, seed=1)
  model = model_of(inference)
  encode_text = jax.jit(lambda tokens: model.encode_text(tokens).c)
  c, c_null = encode_text(tokens), np.repeat(encode_text(model.text_encoder.null_tokens(8)), n, axis=0)
  predict = jax.jit(lambda z_t, t_z, c: model.generation(z_t=z_t, t_z=t_z, c=c))
  alpha_bar = steps.ALPHA_BAR["scaled_linear"]
  z_t = noise
  for t, t_prev in ((667, 334), (334, 1), (1, 0)):
    t_z = np.full(n, t, np.int32)
    unconditional, conditional = (np.asarray(predict(z_t, t_z, condition)) for condition in (c_null, c))
    epsilon = unconditional + s * (conditional - unconditional)
    data = (z_t - np.sqrt(1 - alpha_bar[t]) * epsilon) / np.sqrt(alpha_bar[t])
    z_t = (np.sqrt(alpha_bar[t_prev]) * data + np.sqrt(1 - alpha_bar[t_prev]) * epsilon).astype(np.float32)
  expected = np.asarray(jax.jit(model.decode_image)(z_t)).astype(int)

  images = inference.generate(params_of(inference), tokens, noise)
  assert images.shape == (n, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 1
  assert np.abs(images - expected).max() <= 1

  coarse = noise.astype(np.float16)
  generate = functools.partial(inspect.unwrap(Inference.generate), inference, params_of(inference), tokens)
  np.testing.assert_array_equal(generate([*coarse]), generate(coarse.astype(np.float32)))

  more = inference.generate(params_of(inference), BATCH.tokens[:6], inference.noise(6, seed=1))
  np.testing.assert_array_equal(more[:n], images)
  assert (more[-1] != more[-2]).any()


def test_noise_of_an_image_depends_on_seed_and_index_alone(inference):
  noise = inference.noise(64, seed=2)
  assert noise.shape == (64, *inference.network.latent_shape) == (64, 4, 4, 4)
  np.testing.assert_array_equal(inference.noise(3, seed=2), noise[:3])
  np.testing.assert_array_equal(inference.noise(3, seed=2, first=40), noise[40:43])
  assert (inference.noise(3, seed=3) != noise[:3]).all()
  assert len(np.unique(noise, axis=0)) == 64
  assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.06


def test_text_queries_have_unit_length_on_any_mesh(inference):
  params = params_of(inference)
  embedded = inference.embed_texts(params, BATCH.tokens)
  expected = jax.jit(lambda tokens: model_of(inference).encode_text(tokens).e)(BATCH.tokens)
  np.testing.assert_allclose(embedded, expected, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(embedded[-1], embedded[-2])
  on_eight = steps.make_inference(steps.make_config(), mesh=steps.make_mesh(2, 2, 2), batch_size=3)
  assert on_eight.batch_size == 8
  np.testing.assert_allclose(on_eight.embed_texts(params, BATCH.tokens[:11]), embedded[:11], atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
def test_images_and_queries_on_any_mesh_equal_those_of_one_device(inference, shape):
  """Eleven rows are no multiple of eight devices, and the parameters are sharded as in training."""
  on_eight = steps.make_inference(
    steps.make_config(), mesh=steps.make_mesh(*shape), batch_size=8, generation_steps=3, generation_guidance=2.0
  )
  params = params_of(inference)
  sharded = jax.tree.map(lambda x, abstract: jax.device_put(x, abstract.sharding), params, on_eight.abstract_params())
  assert not sharded["unet.time.fc1.kernel"].sharding.is_fully_replicated
  images, tokens, noise = BATCH.image[:11], BATCH.tokens[:11], inference.noise(11, seed=4)
  queries = inference.embed_images(params, images, seed=4)
  np.testing.assert_allclose(on_eight.embed_images(sharded, images, seed=4), queries, atol=1e-5)
  assert np.abs(queries[0] - queries[1:]).max(axis=1).min() > 1e-3
  drawn = inference.generate(params, tokens, noise)
  assert np.abs(on_eight.generate(sharded, tokens, noise).astype(int) - drawn.astype(int)).max() <= 1
  assert np.abs(drawn[0].astype(int) - drawn[1:].astype(int)).max(axis=(1, 2, 3)).min() > 1


@pytest.mark.parametrize("name", ["generation", "discrimination"])
def test_parameters_are_gathered_once_and_not_at_each_step(name):
  """The mesh shards the parameters, as in the evaluations of a run."""
  mesh = steps.make_mesh(1, 8, 1)
  model = steps.make_inference(steps.make_config(), mesh=mesh, batch_size=8, steps=3, generation_steps=3)
  text = model.trace(name).lower().compile().as_text()
  assert " while(" in text
  gathered = [collective for collective in hlo.collectives(text) if collective.kind == "all-gather"]
  assert sum(math.prod(shape) for collective in gathered for shape in collective.shapes) > 1e4
  assert {collective.times for collective in hlo.collectives(text)} == {1}


def test_a_task_that_the_run_was_not_trained_for_is_refused():
  generating, discriminating = make("generation"), make("discrimination")
  with pytest.raises(UserError, match="not trained for discrimination; its objectives are generation"):
    generating.embed_images({}, BATCH.image, seed=0)
  with pytest.raises(UserError, match="not trained for generation; its objectives are discrimination"):
    discriminating.generate({}, BATCH.tokens, generating.noise(16, seed=0))
  with pytest.raises(UserError, match="of 0 rows; .* at least one"):
    generating.embed_texts({}, BATCH.tokens[:0])
  with pytest.raises(UserError, match="this run is an autoencoder alone, which reads no text; take a run of DiffDis"):
    make("reconstruction").embed_texts({}, BATCH.tokens)


@pytest.mark.parametrize(
  "images",
  [
    BATCH.image.astype(np.float32) / 255,  # other libraries have such images; here they would be black
    np.zeros((2, 32, 32, 3), np.uint8),  # a convolutional network would accept it
    np.zeros((2, 16, 24, 3), np.uint8),
    list(BATCH.image),
    Image.fromarray(BATCH.image[0]),
  ],
)
def test_other_images_are_refused(images):
  with pytest.raises(UserError, match=r"images are .*; give one array of uint8 \('n', 16, 16, 3\)"):
    make("discrimination").embed_images({}, images, seed=0)


@pytest.mark.parametrize("tokens", [np.zeros((2, 5), np.int32), np.zeros((2, 9), np.int32), ["a red star"]])
def test_other_tokens_are_refused(tokens):
  """The padding affects generation: with fewer tokens the image would be another one."""
  with pytest.raises(UserError, match=r"tokens are .*; give \(n, 8\), as Tokenizer\(8\) makes them"):
    inspect.unwrap(Inference.embed_texts)(make("generation"), {}, tokens)


@pytest.mark.parametrize("shape", [(3, 4, 4, 4), (1, 4, 4, 4), (2, 8, 8, 4)])
def test_noise_of_another_shape_is_refused(shape):
  with pytest.raises(UserError, match=r"the noise has shape .*; these texts and this run need \(2, 4, 4, 4\)"):
    inspect.unwrap(Inference.generate)(make("generation"), {}, BATCH.tokens[:2], jnp.zeros(shape))


def test_load_takes_averaged_parameters_if_there_are_some(tmp_path):
  config = steps.make_config("reconstruction")
  workdir.open_for_training(str(tmp_path), config.to_dict())
  params = params_of(steps.make_inference(config))
  averaged = {name: value + 1 for name, value in params.items() if not name.endswith("bias")}
  with checkpoint.Checkpointer(str(tmp_path)) as checkpointer:
    checkpointer.save(7, TrainState(step=7, params=params, ema=averaged, opt_state=()))
  inference, loaded = load(str(tmp_path), num_noise_samples=3)
  expected = {
    "steps": 1,
    "num_noise_samples": 3,
    "guidance": 1.0,
    "normalize_query": True,
    "matmul_precision": "highest",
  }
  assert inference.protocol == expected
  for name, value in {**params, **averaged}.items():
    np.testing.assert_array_equal(loaded[name], value, err_msg=name)
  _, loaded = load(str(tmp_path), ema=False)
  for name, value in params.items():
    np.testing.assert_array_equal(loaded[name], value, err_msg=name)
