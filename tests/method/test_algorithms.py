"""Compare an image's feature with Algorithm 3. test_inference.py checks Algorithms 2 and 3 by hand, and
training/test_step.py Algorithm 1."""

from __future__ import annotations

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from diffdis_jax.method import algorithms, features, samplers, schedules, step_noise
from diffdis_jax.method.features import FeatureNoise
from tests import steps
from tests.models.networks import random_params


def network_of(**changes):
  network = steps.network_of(steps.make_config(**changes))
  return network, random_params(network.shapes, seed=0)


def test_an_images_feature_is_algorithm_three_with_one_step():
  """The two have the same bits if γ is 1; with another γ the loop ends at γ ê_0."""
  network, params = network_of(**{"text_diffusion.gamma": 1.0})
  images = steps.make_batch(steps.make_config()).image[:4]
  e_T = np.random.default_rng(0).standard_normal((4, network.model.query_width)).astype(np.float32)

  def feature(params):
    return features.image_features(
      network.with_params(params), jnp.asarray(images), FeatureNoise(noise_e=jnp.asarray(e_T)), network=network
    )

  def last(params):
    """Run Algorithm 3's loop and return its result before normalisation."""
    model, process = network.with_params(params), network.text_process
    z, c_null = model.encode_image(jnp.asarray(images)), model.encode_text(model.text_encoder.null_tokens(8)).c

    def step(e_t, step_coefficients):
      how = dict(z=z, c_null=c_null, network=network, guidance_scale=1.0, normalize_query=False)
      return algorithms.text_query_step(model, e_t, step_coefficients, **how).x_prev, None

    coefficients = samplers.ddim_coefficients(process, schedules.trailing(1))
    return jax.lax.scan(step, jnp.asarray(e_T), coefficients)[0]

  feature_, expected = jax.jit(feature)(params), jax.jit(last)(params)
  np.testing.assert_array_equal(feature_, expected)

  def query(params):
    model = network.with_params(params)
    z = model.encode_image(jnp.asarray(images))
    how = dict(steps=1, guidance_scale=1.0, normalize_query=False)
    return algorithms.denoise_text_query(model, z, jnp.asarray(e_T)[None], network=network, **how)

  unit = feature_ / np.linalg.norm(feature_, axis=1, keepdims=True)
  np.testing.assert_allclose(jax.jit(query)(params), unit, atol=1e-6)


def test_an_evaluations_noise_depends_on_key_sample_and_place_alone():
  """Figures that were published are measured again with the same noise."""
  network = steps.network_of(steps.make_config())
  key, places = jax.random.key(3), jnp.array([7, 2])
  noise = step_noise.noise_at(key, jnp.int32(5), sample=jnp.int32(4), places=places, network=network)
  for number, name, shape in ((0, "noise_z", network.latent_shape), (1, "noise_e", (network.model.query_width,))):
    folded = functools.reduce(jax.random.fold_in, (number, 4, 2), key)
    np.testing.assert_array_equal(getattr(noise, name)[1], jax.random.normal(folded, shape))
  np.testing.assert_array_equal(noise.t_z, [5, 5])
  np.testing.assert_array_equal(noise.t_e, [5, 5])
  assert not noise.drop_image.any() and not noise.drop_condition.any()
