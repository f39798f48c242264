"""Test that both kinds of RandAugment equal torchvision's and timm's, pixel by pixel."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import stats
from timm.data import auto_augment

from diffdis_jax.data import randaugment
from diffdis_jax.data.transforms import Augmentation, augment
from diffdis_jax.errors import UserError

autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
functional = pytest.importorskip("torchvision.transforms.functional")


def photo() -> Image.Image:
  """Draw colour ramps, noise and edges."""
  rows, columns = np.mgrid[0:48, 0:56]
  ramp = np.stack([rows * 5, columns * 4, (rows + columns) * 2], -1)
  noisy = np.clip(ramp + np.random.default_rng(0).integers(-20, 20, ramp.shape), 0, 255)
  image = Image.fromarray(noisy.astype(np.uint8))
  ImageDraw.Draw(image).ellipse((10, 8, 40, 30), fill=(200, 30, 60), outline=(255, 255, 255))
  return image


@pytest.mark.parametrize("name", randaugment.TORCHVISION)
def test_each_operation_equals_torchvisions_at_each_magnitude(name):
  image = photo()
  magnitudes, signed = autoaugment.RandAugment()._augmentation_space(randaugment.MAGNITUDES, (48, 56))[name]
  for magnitude in range(randaugment.MAGNITUDES):
    theirs = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    if name.startswith("Translate"):
      theirs = float(int(theirs))  # torchvision translates by whole pixels
    ours = randaugment.torchvision_amount(name, magnitude, image)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    for sign in (1, -1) if signed else (1,):
      expected = autoaugment._apply_op(
        image, name, sign * theirs, interpolation=functional.InterpolationMode.NEAREST, fill=None
      )
      amount = ours if magnitude in (0, 9, 30) else theirs  # elsewhere the last bit of a float32 may differ
      ours_applied = randaugment.OPERATIONS[name](image, sign * amount, randaugment.NEAREST)
      np.testing.assert_array_equal(np.asarray(ours_applied), np.asarray(expected), err_msg=f"{name} {sign * amount}")


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)).resize((40, 48))
HPARAMS = dict(img_mean=randaugment.FILL, interpolation=Image.Resampling.BICUBIC, translate_pct=0.45, magnitude_std=0)


INC1 = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(HPARAMS))
NAMES = dict(zip(randaugment.TIMM, (op.name for op in INC1.ops), strict=True))


def by_timm(image, name, level):
  side = {"TranslateX": image.width, "TranslateY": image.height}.get(name, 1)
  return randaugment.OPERATIONS[name](image, randaugment.TIMM[name](level) * side, randaugment.BICUBIC)


@pytest.mark.parametrize("name", randaugment.TIMM)
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 8.7, 10.0])
def test_an_operation_gives_timms_pixels(name, magnitude, monkeypatch):
  for negative in (False, True):
    monkeypatch.setattr(random, "random", lambda negative=negative: 0.9 if negative else 0.1)
    expected = auto_augment.AugmentOp(NAMES[name], prob=1.0, magnitude=magnitude, hparams=HPARAMS)(IMAGE)
    level = (-magnitude if negative and name in randaugment.SIGNED else magnitude) / randaugment.LARGEST
    ours = by_timm(IMAGE, name, level)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_each_operation_is_done_half_of_the_time(monkeypatch):
  called = []
  for name in randaugment.TIMM:
    monkeypatch.setitem(randaugment.TIMM, name, lambda level, name=name: called.append((name, level)) or 1.0)
  rng = np.random.default_rng(0)
  for _ in range(3000):
    randaugment.timm_randaugment(IMAGE, rng, operations=2, magnitude=9, deviation=0.5)
  names, levels = zip(*called, strict=True)
  assert stats.binomtest(len(called), 6000, 0.5).pvalue > 0.01
  assert stats.chisquare([names.count(name) for name in randaugment.TIMM]).pvalue > 0.01
  size = 10 * np.abs(levels)
  assert size.max() == 10 and abs(np.median(size) - 9) < 0.05 and abs(np.percentile(size, 15.87) - 8.5) < 0.05
  two_sided = [level < 0 for name, level in called if name == "Rotate"]
  assert stats.binomtest(sum(two_sided), len(two_sided), 0.5).pvalue > 0.01
  assert min(level for name, level in called if name == "Invert") > 0


def test_erasing_fills_a_box_with_noise_of_the_statistics_of_images():
  pixels, rng = np.full((64, 64, 3), 255, np.uint8), np.random.default_rng(0)
  shares, values, ratios, places = [], [], [], []
  for _ in range(400):
    erased = randaugment.erase(pixels, rng, probability=0.25)
    assert erased.shape == pixels.shape
    changed = (erased != 255).any(axis=2)
    if not changed.any():
      continue
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    inside = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = inside.shape[:2]
    shares.append(height * width / 64**2)
    ratios.append(np.log(height / width))
    places += [(rows[0] + 0.5) / (65 - height), (columns[0] + 0.5) / (65 - width)]
    values.append(inside.reshape(-1, 3))
  assert stats.binomtest(len(shares), 400, 0.25).pvalue > 0.01
  assert 0.015 < min(shares) < 0.06 and 0.28 < max(shares) < 0.345
  assert stats.kstest(ratios, stats.uniform(np.log(0.3), -2 * np.log(0.3)).cdf).pvalue > 0.01
  assert stats.kstest(places, "uniform").pvalue > 0.01
  values = np.concatenate(values) / 255
  np.testing.assert_allclose(np.median(values, axis=0), randaugment.MEAN, atol=0.02)
  quartiles = np.percentile(values, 75, axis=0) - np.percentile(values, 25, axis=0)
  np.testing.assert_allclose(quartiles, 1.349 * np.array(randaugment.STD), atol=0.02)
  assert (pixels == 255).all()


def test_an_augmentation_may_have_randaugment_and_erasing():
  how = Augmentation(
    randaugment_operations=2, randaugment_kind="timm", randaugment_deviation=0.5, erase=1.0, crop="random_resized"
  )
  first, again = (augment(IMAGE, np.random.default_rng(5), size=32, how=how) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert first.shape == (32, 32, 3)
  with pytest.raises(UserError, match="randaugment_magnitude is 11; it must be at most 10"):
    Augmentation(randaugment_kind="timm", randaugment_magnitude=11)
  with pytest.raises(UserError, match="erase is 2"):
    Augmentation(erase=2)
