"""The paper's three algorithms where the pages say that they are, and what their loops cost. Their numbers are checked
by hand in tests/test_inference.py (Algorithms 2 and 3) and tests/training/test_step.py (Algorithm 1)."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import diffdis_jax
from diffdis_jax.method import algorithms, features, samplers, schedules
from diffdis_jax.method.features import FeatureNoise
from tests import steps
from tests.models.networks import random_params

ROOT = pathlib.Path(diffdis_jax.__file__).parents[1]
# `function` (`file:line`), as the pages name them.
REFERENCE = re.compile(r"`(\w+)`\s+\(`(diffdis_jax/[\w/]+\.py):(\d+)`\)")


def defined(file: str) -> dict[str, int]:
  """Function -> line of its definition."""
  tree = ast.parse((ROOT / file).read_text())
  return {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", ["docs/method.md", "README.md"])
def test_the_pages_name_the_functions_and_their_lines(page):
  found = REFERENCE.findall((ROOT / page).read_text())
  assert {"training_losses", "generate", "denoise_text_query"} <= {name for name, _, _ in found}
  for name, file, line in found:
    assert defined(file)[name] == int(line), f"{page}: {name} is at {file}:{defined(file)[name]}"


@pytest.mark.parametrize("number, name", [(1, "training_losses"), (2, "generate"), (3, "denoise_text_query")])
def test_each_function_says_which_algorithm_it_is(number, name):
  assert inspect.getdoc(getattr(algorithms, name)).startswith(f"Algorithm {number}: ")


def network_of(**changes):
  network = steps.network_of(steps.make_config(**changes))
  return network, random_params(network.shapes, seed=0)


def test_an_images_feature_is_algorithm_three_with_one_step():
  """The same bits where γ is 1; with another γ the loop ends at γ ê_0, which is divided by γ again."""
  network, params = network_of(**{"text_diffusion.gamma": 1.0})
  images = steps.make_batch(steps.make_config()).image[:4]
  e_T = np.random.default_rng(0).standard_normal((4, network.model.query_width)).astype(np.float32)

  def feature(params):
    return features.image_features(
      network.with_params(params), jnp.asarray(images), FeatureNoise(noise_e=jnp.asarray(e_T)), network=network
    )

  def last(params):
    """Algorithm 3's loop, before its result is normalised."""
    model, process = network.with_params(params), network.text_process
    z, c_null = model.encode_image(jnp.asarray(images)), model.encode_text(model.text_encoder.null_tokens(8)).c

    def step(e_t, now):
      how = dict(z=z, c_null=c_null, network=network, guidance_scale=1.0, normalize_query=False)
      return algorithms.text_query_step(model, e_t, now, **how).x_prev, None

    coefficients = samplers.ddim_coefficients(process, schedules.trailing(1))
    return jax.lax.scan(step, jnp.asarray(e_T), coefficients)[0] / process.gamma

  found, expected = jax.jit(feature)(params), jax.jit(last)(params)
  np.testing.assert_array_equal(found, expected)

  def query(params):
    model = network.with_params(params)
    z = model.encode_image(jnp.asarray(images))
    how = dict(steps=1, guidance_scale=1.0, normalize_query=False)
    return algorithms.denoise_text_query(model, z, jnp.asarray(e_T)[None], network=network, **how)

  unit = found / np.linalg.norm(found, axis=1, keepdims=True)
  np.testing.assert_allclose(jax.jit(query)(params), unit, atol=1e-6)


def scans(jaxpr) -> list[int]:
  """The lengths of the loops over DDIM's steps, wherever they are in the program."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      found.append(equation.params["length"])
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      found += scans(inner)
  return found


@pytest.mark.parametrize("count", [2, 50])
def test_the_loops_are_scans_whatever_the_number_of_steps(count):
  """So that the network is compiled once."""
  network, params = network_of()
  batch = steps.make_batch(steps.make_config())

  def image(params):
    z_T = jnp.zeros((2, *network.latent_shape))
    how = dict(steps=count, guidance_scale=2.0)
    return algorithms.generate(network.with_params(params), jnp.asarray(batch.tokens[:2]), z_T, network=network, **how)

  def query(params):
    z, e_T = jnp.zeros((2, *network.latent_shape)), jnp.zeros((3, 2, network.model.query_width))
    how = dict(steps=count, guidance_scale=2.0, normalize_query=True)
    return algorithms.denoise_text_query(network.with_params(params), z, e_T, network=network, **how)

  assert scans(jax.make_jaxpr(image)(params).jaxpr) == [count]
  assert scans(jax.make_jaxpr(query)(params).jaxpr) == [3, count]  # each noise sample's steps
