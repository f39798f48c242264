import collections

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffdis_jax.data import randaugment
from diffdis_jax.data.transforms import Augmentation, augment
from diffdis_jax.errors import UserError

autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
functional = pytest.importorskip("torchvision.transforms.functional")


def photo() -> Image.Image:
  """Colour ramps, noise and edges."""
  rows, columns = np.mgrid[0:48, 0:56]
  ramp = np.stack([rows * 5, columns * 4, (rows + columns) * 2], -1)
  noisy = np.clip(ramp + np.random.default_rng(0).integers(-20, 20, ramp.shape), 0, 255)
  image = Image.fromarray(noisy.astype(np.uint8))
  ImageDraw.Draw(image).ellipse((10, 8, 40, 30), fill=(200, 30, 60), outline=(255, 255, 255))
  return image


def test_operations_are_torchvisions():
  space = autoaugment.RandAugment()._augmentation_space(randaugment.MAGNITUDES, (48, 56))
  assert list(space) == list(randaugment.OPERATIONS)
  assert [name for name, (_, signed) in space.items() if signed] == list(randaugment.SIGNED)


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_each_operation_equals_torchvisions_at_each_magnitude(name):
  image = photo()
  magnitudes, signed = autoaugment.RandAugment()._augmentation_space(randaugment.MAGNITUDES, (48, 56))[name]
  for magnitude in range(randaugment.MAGNITUDES):
    theirs = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    ours = randaugment.strength(name, magnitude, image.size)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    for sign in (1, -1) if signed else (1,):
      expected = autoaugment._apply_op(
        image, name, sign * theirs, interpolation=functional.InterpolationMode.NEAREST, fill=None
      )
      amount = ours if magnitude in (0, 9, 30) else theirs  # elsewhere the last bit of a float32 may differ
      found = randaugment.OPERATIONS[name](image, sign * amount)
      np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=f"{name} {sign * amount}")


def test_every_operation_is_drawn_alike(monkeypatch):
  drawn = collections.Counter()

  def counting(name):
    def operation(image, amount):
      drawn[name, np.sign(amount) if name in randaugment.SIGNED else 0] += 1
      return image

    return operation

  monkeypatch.setattr(randaugment, "OPERATIONS", {name: counting(name) for name in randaugment.OPERATIONS})
  rng = np.random.default_rng(0)
  for _ in range(2000):
    randaugment.randaugment(photo(), rng, operations=2, magnitude=9)
  assert len(drawn) == 14 + 9
  for (name, _), count in drawn.items():
    expected = 4000 / 14 / (2 if name in randaugment.SIGNED else 1)
    assert abs(count - expected) < 5 * expected**0.5
  left, right = (sum(count for (_, sign), count in drawn.items() if sign == each) for each in (-1, 1))
  assert abs(left - right) < 5 * (left + right) ** 0.5  # over all operations, where a coin's bias shows


def test_by_config():
  how = Augmentation(randaugment_operations=2, randaugment_magnitude=9)
  views = {augment(photo(), np.random.default_rng(seed), size=32, how=how).tobytes() for seed in range(20)}
  assert len(views) > 10
  with pytest.raises(UserError, match="randaugment_magnitude is 31; it must be at most 30"):
    Augmentation(randaugment_magnitude=31)
