"""timm's RandAugment and random erasing against timm itself."""

import random

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from timm.data import auto_augment

from diffdis_jax.data import randaugment_timm
from diffdis_jax.data.transforms import Augmentation, augment
from diffdis_jax.errors import UserError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)).resize((40, 48))
HPARAMS = dict(
  img_mean=randaugment_timm.FILL, interpolation=Image.Resampling.BICUBIC, translate_pct=0.45, magnitude_std=0
)


def test_the_operations_are_those_of_inc1():
  transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(HPARAMS))
  assert [op.name for op in transform.ops] == [*randaugment_timm.OPERATIONS]
  assert {op.prob for op in transform.ops} == {randaugment_timm.PROBABILITY} and transform.num_layers == 2
  # As its transforms_factory makes the fill colour of CLIP's mean.
  assert tuple(min(255, round(255 * x)) for x in randaugment_timm.MEAN) == randaugment_timm.FILL


@pytest.mark.parametrize("name", randaugment_timm.OPERATIONS)
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 8.7, 10.0])
def test_an_operation_gives_timms_pixels(name, magnitude, monkeypatch):
  for negative in (False, True):
    monkeypatch.setattr(random, "random", lambda negative=negative: 0.9 if negative else 0.1)
    expected = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=HPARAMS)(IMAGE)
    one_sided = name in randaugment_timm._ONE_SIDED
    level = (-magnitude if negative and not one_sided else magnitude) / randaugment_timm.LARGEST
    found = randaugment_timm.OPERATIONS[name](IMAGE, level)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_each_operation_is_done_half_of_the_time(monkeypatch):
  called = []
  for name in randaugment_timm.OPERATIONS:
    record = lambda image, level, name=name: called.append((name, level)) or image
    monkeypatch.setitem(randaugment_timm.OPERATIONS, name, record)
  rng = np.random.default_rng(0)
  for _ in range(3000):
    randaugment_timm.randaugment(IMAGE, rng, operations=2, magnitude=9, deviation=0.5)
  names, levels = zip(*called, strict=True)
  assert stats.binomtest(len(called), 6000, 0.5).pvalue > 0.01
  assert stats.chisquare([names.count(name) for name in randaugment_timm.OPERATIONS]).pvalue > 0.01
  size = 10 * np.abs(levels)
  assert size.max() == 10 and abs(np.median(size) - 9) < 0.05 and abs(np.percentile(size, 15.87) - 8.5) < 0.05
  two_sided = [level < 0 for name, level in called if name == "Rotate"]
  assert stats.binomtest(sum(two_sided), len(two_sided), 0.5).pvalue > 0.01
  assert min(level for name, level in called if name == "Invert") > 0


def test_a_box_is_erased_by_noise_like_an_image():
  pixels, rng = np.full((64, 64, 3), 255, np.uint8), np.random.default_rng(0)
  shares, values, ratios, places = [], [], [], []
  for _ in range(400):
    erased = randaugment_timm.erase(pixels, rng, probability=0.25)
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
  np.testing.assert_allclose(np.median(values, axis=0), randaugment_timm.MEAN, atol=0.02)
  quartiles = np.percentile(values, 75, axis=0) - np.percentile(values, 25, axis=0)
  np.testing.assert_allclose(quartiles, 1.349 * np.array(randaugment_timm.STD), atol=0.02)
  assert (pixels == 255).all()


def test_both_are_part_of_the_augmentation():
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
