"""Compare FID's Inception with torch-fidelity's, with random weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from diffdis_jax.evals.fid.features import Extractor
from diffdis_jax.interop import inception as read_inception
from diffdis_jax.parallel import sharding
from tests.inception_weights import LAYERS

pytest_plugins = ("tests.inception_weights",)
SIZES = ((64, 64), (256, 256), (299, 299), (300, 200))
TOLERANCE = 1e-4


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
  """Return the largest difference, relative to the image's largest feature."""
  return float((np.abs(ours - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())


def draw(size: tuple[int, int], n: int, seed: int = 0) -> np.ndarray:
  """Return images with structure at every scale: pure noise has the same features everywhere."""
  rng = np.random.default_rng([seed, *size])
  coarse = torch.from_numpy(rng.normal(size=(n, 3, 5, 4)).astype(np.float32))
  smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic").numpy()
  image = 128 + 60 * smooth + 20 * rng.normal(size=smooth.shape)
  return image.transpose(0, 2, 3, 1).clip(0, 255).astype(np.uint8)


def make_extractor(params: dict[str, np.ndarray]) -> Extractor:
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  return Extractor(params, kind="tensorflow", mesh=mesh, batch_size=2)


@pytest.fixture(scope="module")
def extractor(inception_file) -> Extractor:
  return make_extractor(read_inception.read(str(inception_file)).params)


@pytest.fixture(scope="module")
def theirs(inception_file) -> fidelity.FeatureExtractorInceptionV3:
  file = str(inception_file)
  return fidelity.FeatureExtractorInceptionV3("random", LAYERS, feature_extractor_weights_path=file).eval()


def test_features_of_four_sizes(extractor, theirs):
  for size in SIZES:
    images = draw(size, 2)
    with torch.no_grad():
      expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[-1].numpy()
    assert expected.std() > 0.01, "the random network is dead"
    assert relative(extractor(images), expected) <= TOLERANCE, size


def test_it_has_the_parameters_of_the_graph():
  shapes = read_inception.shapes()
  of = lambda kind: sum(np.prod(x.shape) for path, x in shapes.items() if path.endswith(kind))
  assert of("kernel") + of("scale") + of("bias") == 21_785_568
  assert sum(path.endswith("kernel") for path in shapes) == 94 and len(shapes) == 94 * 5
