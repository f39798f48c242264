from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from diffdis_jax.evals.fid import features as resize

SIZES = ((16, 16), (64, 64), (256, 256), (299, 299), (300, 200), (512, 400))


def draw(size: tuple[int, int], n: int = 2) -> np.ndarray:
  return np.random.default_rng(size).integers(0, 256, (n, *size, 3), np.uint8)


def channels_first(images: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


@pytest.mark.parametrize("size", SIZES)
def test_tensorflows_resize_is_torch_fidelitys(size):
  images = draw(size)
  resized = np.asarray(jax.jit(resize.tensorflow)(jnp.asarray(images))).transpose(0, 3, 1, 2)
  expected = interpolate_bilinear_2d_like_tensorflow1x(channels_first(images), size=(299, 299), align_corners=False)
  np.testing.assert_allclose(resized, expected, atol=1e-4)
  half_pixels = torch.nn.functional.interpolate(channels_first(images), (299, 299), mode="bilinear").numpy()
  if size != (299, 299):
    assert np.abs(half_pixels - resized).max() > 1


def test_the_input_is_torch_fidelitys():
  values = np.arange(256, dtype=np.float32)
  x = np.broadcast_to(np.resize(values, 299)[:, None, None], (1, 299, 299, 3))
  normalised = np.asarray(resize.to_input(jnp.asarray(x)))
  np.testing.assert_array_equal(normalised[0, :256, 0, 0], (values - 128) / 128)
  assert np.abs(normalised[0, :256, 0, 0] - (values / 127.5 - 1)).max() > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_clean_is_bicubic_and_antialiased_without_rounding(size):
  images = draw(size)
  resized = resize.clean(images)
  how = dict(mode="bicubic", antialias=True)  # torch's kernel is PIL's where it is antialiased
  expected = torch.nn.functional.interpolate(channels_first(images), (299, 299), **how).clamp(0, 255).numpy()
  np.testing.assert_allclose(resized.transpose(0, 3, 1, 2), expected, atol=0.01)
  assert resized.dtype == np.float32 and resized.min() >= 0 and resized.max() <= 255
  if size != (299, 299):
    assert (resized != np.rint(resized)).mean() > 0.5


def test_real_images_are_cut_to_their_middle():
  image = np.zeros((40, 100, 3), np.uint8)
  image[:, 30:70] = 200
  square = resize.square(Image.fromarray(image), 20)
  assert square.shape == (20, 20, 3) and (square == 200).all()
  image = draw((33, 20), 1)[0]
  square = resize.square(Image.fromarray(image), 20)
  np.testing.assert_array_equal(square, image[6:26])
