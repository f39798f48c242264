"""Test that mixup and CutMix equal timm's, and that their samples have the right distributions."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import Mixup
from timm.data import mixup as timm_mixup

from diffdis_jax.method import long_tail as mixing

B, SIZE, CLASSES = 6, 12, 5
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (B, SIZE, SIZE, 3), np.uint8)
LABELS = np.array([0, 4, 2, 2, 1, 3], np.int32)


def ours(mix, smoothing):
  images = np.asarray(mixing.mix_images(jnp.asarray(IMAGES), mix))
  return images, np.asarray(mixing.mix_targets(jnp.asarray(LABELS), mix, classes=CLASSES, smoothing=smoothing))


def timms(monkeypatch, share, is_cutmix, box, smoothing):
  mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=CLASSES)
  monkeypatch.setattr(mixup, "_params_per_batch", lambda: (share, is_cutmix))
  monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *args, **kwargs: box)
  images, targets = mixup(torch.tensor(IMAGES).permute(0, 3, 1, 2).float(), torch.tensor(LABELS).long())
  return images.permute(0, 2, 3, 1).numpy(), targets.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
  "share, is_cutmix, row, column", [(0.3, False, 0, 0), (0.84, False, 5, 5), (0.55, True, 1, 11), (0.2, True, 6, 6)]
)
def test_pixels_and_targets_equal_timms_for_the_same_draw(monkeypatch, share, is_cutmix, row, column, smoothing):
  mix = mixing.boxed(jnp.float32(share), jnp.asarray(is_cutmix), jnp.int32(row), jnp.int32(column), size=SIZE)
  side = int(SIZE * np.sqrt(1 - share)) // 2
  box = [int(np.clip(edge, 0, SIZE)) for edge in (row - side, row + side, column - side, column + side)]
  assert [int(edge) for edge in (mix.top, mix.bottom, mix.left, mix.right)] == box
  for mixed, expected in zip(ours(mix, smoothing), timms(monkeypatch, share, is_cutmix, box, smoothing), strict=True):
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


def draws(n=3000, **settings):
  how = dict(size=SIZE, mixup=0.8, cutmix=1.0, cutmix_share=0.5) | settings
  keys = jax.random.split(jax.random.key(0), n)
  return types.SimpleNamespace(**jax.device_get(jax.vmap(lambda key: vars(mixing.draw_mix(key, **how)))(keys)))


def test_draws_have_their_distributions():
  mix = draws()
  assert stats.binomtest(int(mix.is_cutmix.sum()), len(mix.share), 0.5).pvalue > 0.01
  mixups = mix.share[~mix.is_cutmix]
  assert stats.kstest(mixups, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
  rows, columns = mix.bottom - mix.top, mix.right - mix.left
  np.testing.assert_allclose(mix.share[mix.is_cutmix], (1 - rows * columns / SIZE**2)[mix.is_cutmix], rtol=1e-6)
  assert rows.max() == columns.max() == SIZE - 2 and rows.min() == 0  # both halves are rounded down


def test_mixup_and_cutmix_have_their_beta_and_boxes_any_centre(monkeypatch):
  unboxed = lambda share, kind, row, column, *, size: mixing.Mix(share, kind, row, row, column, column)
  monkeypatch.setattr(mixing, "boxed", unboxed)
  choices = draws(4000, cutmix=3.0)
  for shares, a in ((choices.share[~choices.is_cutmix], 0.8), (choices.share[choices.is_cutmix], 3.0)):
    assert stats.kstest(shares, stats.beta(a, a).cdf).pvalue > 0.01
  counts = np.zeros((SIZE, SIZE), int)
  np.add.at(counts, (choices.top, choices.left), 1)
  assert stats.chisquare(counts.ravel()).pvalue > 0.01


def test_mixup_or_cutmix_with_weight_0_is_never_drawn():
  assert not draws(50, cutmix=0.0).is_cutmix.any() and draws(50, mixup=0.0).is_cutmix.all()
  none = draws(50, mixup=0.0, cutmix=0.0)
  assert (none.share == 1).all() and not none.is_cutmix.any()
  first = mixing.Mix(**{name: jnp.asarray(value[0]) for name, value in vars(none).items()})
  images, targets = ours(first, 0.0)
  np.testing.assert_array_equal(images, IMAGES)
  np.testing.assert_array_equal(targets, np.eye(CLASSES)[LABELS])
