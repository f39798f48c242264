"""Test the sizes that the paper's network must have, and the errors for models that cannot be built."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import shapes
from diffdis_jax.common.params import flatten
from diffdis_jax.config import Run
from diffdis_jax.config.model import AlignmentSize
from diffdis_jax.errors import UserError
from diffdis_jax.method import network as build
from diffdis_jax.method.alignment import AlignmentTransformer
from diffdis_jax.models import sizes
from tests import tiny
from tests.models import networks
from tests.models.networks import BOTH
from tests.steps import network_of


def test_sd_v1_has_its_exact_number_of_parameters():
  shapes = networks.Network.of(networks.builder(sizes.sd_v1(), BOTH)).shapes
  count = lambda *prefixes: sum(math.prod(leaf.shape) for path, leaf in shapes.items() if path.startswith(prefixes))
  statistics = count("autoencoder.shift", "autoencoder.scale")
  assert statistics == 2 * 4
  assert count("unet.") == 859_520_964
  assert count("autoencoder.") - statistics == 83_653_863
  assert count("text_encoder.") == 123_060_480
  new = count("text_stream.", "alignment.", "logit_scale")
  assert new == count("") - count("unet.", "autoencoder.", "text_encoder.")
  assert abs(new / 125_000_000 - 1) < 0.01


def test_initial_parameters_are_those_of_nnx_rngs():
  size = AlignmentSize(width=8, depth=1, num_heads=2)
  make = lambda rngs: AlignmentTransformer(size, query_width=8, image_width=8, dtype=np.float32, rngs=rngs)
  key = jax.random.key(3)
  ours, expected = flatten(build.initial_state(make, key)), flatten(nnx.state(make(nnx.Rngs(key))))
  assert ours.keys() == expected.keys()
  for path in ours:
    np.testing.assert_array_equal(ours[path], expected[path])
  kernels = [np.asarray(value).ravel()[:4].tolist() for path, value in ours.items() if path.endswith("kernel")]
  assert len({tuple(kernel) for kernel in kernels}) == len(kernels), "each parameter is sampled with a key of its own"


@pytest.mark.parametrize("config", [tiny.get_config(), shapes.get_config("objectives=contrastive")])
@pytest.mark.parametrize("temperature", [None, 40.0])
def test_the_scale_starts_at_the_logarithm_of_the_temperature(config, temperature):
  config = config.copy_and_resolve_references()
  if temperature is not None:
    config.model.temperature = temperature
  network = network_of(config)
  scale = jax.jit(lambda key: network.initialise(key)["logit_scale"])(jax.random.key(0))
  assert float(scale) == pytest.approx(math.log(temperature or 1 / 0.07), rel=1e-6)


def check(model: dict[str, Any], objectives: tuple[str, ...], image_size: int, max_length: int) -> None:
  config = tiny.get_config()
  config.model, config.objectives, config.image_size = ConfigDict(model), objectives, image_size
  config.data.max_length = max_length
  Run.of(config)


def broken(section: str | None, **changes: Any) -> dict[str, Any]:
  model = networks.tiny_model()
  (model if section is None else model[section]).update(changes)
  return model


@pytest.mark.parametrize(
  "model, objectives, image_size, message",
  [
    (broken(None), (), 16, "objectives is empty; choose among generation, discrimination, reconstruction"),
    (broken(None), ("generate",), 16, r"objectives\[0\] is 'generate'; it must be one of generation"),
    (broken(None), ("contrastive", "discrimination"), 16, "contrastive is trained alone"),
    (broken(None), ("reconstruction", "generation"), 16, "reconstruction is trained alone"),
    (broken(None), BOTH, 20, "image_size is 20; .* must be a multiple of 8, such as 16"),
    (broken(None), ("reconstruction",), 15, "image_size is 15; .* must be a multiple of 2, such as 16"),
    (broken("unet", attention=(True,)), BOTH, 16, "model.unet.attention has 1 entries and widths 3"),
    (broken("unet", widths=(8, 15, 24)), BOTH, 16, "model.unet.widths has .*15.*; .*num_heads=2"),
    (broken("unet", groups=16), BOTH, 16, "model.unet.widths has .*8.*; .*groups=16"),
    (broken("text_encoder", num_heads=5), BOTH, 16, "model.text_encoder.width has .*multiple of num_heads=5"),
    (broken("alignment", num_heads=5), BOTH, 16, "model.alignment.width has .*multiple of num_heads=5"),
    (
      broken("alignment", spatial_pool=3),
      BOTH,
      16,
      "model.alignment.spatial_pool is 3; the middle feature map is 2 x 2",
    ),
  ],
)
def test_models_that_cannot_be_built_are_named(model, objectives, image_size, message):
  with pytest.raises(UserError, match=message) as error:
    check(model, objectives, image_size, 8)
  assert "\n" not in str(error.value)
