"""FID's Inception against torch-fidelity's, with random weights: whole, and block by block with each known mistake."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from diffdis_jax.common.params import flatten, merge
from diffdis_jax.evals.fid.features import Extractor
from diffdis_jax.interop import inception as read_inception
from diffdis_jax.method.network import abstract_module
from diffdis_jax.models import inception
from diffdis_jax.parallel import sharding
from tests.inception_weights import LAYERS, randomise

pytest_plugins = ("tests.inception_weights",)
SIZES = ((64, 64), (256, 256), (299, 299), (300, 200))
TOLERANCE = 1e-4


def relative(found: np.ndarray, expected: np.ndarray) -> float:
  """The largest difference, as a fraction of the image's largest feature."""
  return float((np.abs(found - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())


def draw(size: tuple[int, int], n: int, seed: int = 0) -> np.ndarray:
  """Images with structure at every scale: noise alone has the same features everywhere."""
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


def check_features(extractor: Extractor, theirs: fidelity.FeatureExtractorInceptionV3, each: int) -> None:
  for size in SIZES:
    images = draw(size, each)
    with torch.no_grad():
      expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[-1].numpy()
    assert expected.std() > 0.01, "the random network is dead"
    assert relative(extractor(images), expected) <= TOLERANCE, size


def test_features_of_four_sizes(extractor, theirs):
  check_features(extractor, theirs, each=2)


@pytest.mark.full
def test_features_of_64_images(extractor, theirs):
  check_features(extractor, theirs, each=16)


def test_it_has_the_parameters_of_the_graph():
  shapes = read_inception.shapes()
  of = lambda kind: sum(np.prod(x.shape) for path, x in shapes.items() if path.endswith(kind))
  assert of("kernel") + of("scale") + of("bias") == 21_785_568
  assert sum(path.endswith("kernel") for path in shapes) == 94 and len(shapes) == 94 * 5


# Block -> ours and torch-fidelity's, with few channels coming in, on few pixels.
CHANNELS = 6
BLOCKS = {
  "A": (functools.partial(inception.BlockA, CHANNELS, pool=5), lambda: fidelity.InceptionA(CHANNELS, pool_features=5)),
  "B": (functools.partial(inception.BlockB, CHANNELS), lambda: fidelity.InceptionB(CHANNELS)),
  "C": (functools.partial(inception.BlockC, CHANNELS, width=7), lambda: fidelity.InceptionC(CHANNELS, channels_7x7=7)),
  "D": (functools.partial(inception.BlockD, CHANNELS), lambda: fidelity.InceptionD(CHANNELS)),
  "E": (functools.partial(inception.BlockE, CHANNELS, last=False), lambda: fidelity.InceptionE_1(CHANNELS)),
  "last": (functools.partial(inception.BlockE, CHANNELS, last=True), lambda: fidelity.InceptionE_2(CHANNELS)),
}


def block_error(name: str) -> float:
  """How far a block is from torch-fidelity's."""
  make_ours, make_theirs = BLOCKS[name]
  (graphdef, abstract), theirs = abstract_module(lambda rngs: make_ours(rngs=rngs)), make_theirs()
  randomise(theirs, seed=1)
  theirs.eval()
  state = theirs.state_dict()
  params = {}
  for path in flatten(abstract):
    *layers, layer, kind = path.split(".")
    value = state[".".join([*layers, read_inception.ENDINGS[f"{layer}.{kind}"]])].numpy()
    params[path] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
  x = np.random.default_rng(0).normal(size=(2, 9, 7, CHANNELS)).astype(np.float32)
  with torch.no_grad():
    with torch.no_grad():
      expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  found = np.asarray(jax.jit(lambda params, x: merge(graphdef, abstract, params)(x))(params, x)).transpose(0, 3, 1, 2)
  return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
  assert block_error(name) <= 1e-5
