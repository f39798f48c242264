"""Compare nearest neighbours, votes and the linear loss with NumPy over all pairs, ties included."""

import collections

import numpy as np
import pytest

from diffdis_jax.evals import long_tail as nearest
from diffdis_jax.training import anchors

IMAGES, SENTENCES, CLASSES = 30, 50, 6


def make(seed=0):
  """Return vectors of small whole numbers, so that scores are exact and many are equal."""
  rng = np.random.default_rng(seed)
  images, texts = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (IMAGES, SENTENCES))
  image_labels = np.concatenate([np.arange(CLASSES), rng.integers(CLASSES, size=IMAGES - CLASSES)])
  return images, texts, image_labels, rng.integers(CLASSES, size=SENTENCES)


@pytest.mark.parametrize("scores", [1, 400, 2**26])
@pytest.mark.parametrize("count", [1, 5])
def test_the_nearest_neighbours_are_those_of_a_stable_sort(scores, count, monkeypatch):
  monkeypatch.setattr(nearest, "SCORES", scores)
  images, texts, *_ = make()
  scores = images @ texts.T
  assert len(np.unique(scores)) < 10  # ties everywhere
  expected = np.argsort(-scores, axis=1, kind="stable")[:, :count]
  np.testing.assert_array_equal(nearest.nearest(images, texts, count=count), expected)


def test_all_keys_are_returned_if_few_and_nan_is_never_nearest():
  assert nearest.nearest(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), count=5).tolist() == [[0, 1], [1, 0]]
  keys = np.array([[np.nan, 0], [1, 0], [0, 1]], np.float32)
  assert nearest.nearest(np.eye(2, dtype=np.float32), keys, count=1)[:, 0].tolist() == [1, 2]


def test_a_vote_equals_that_of_counter():
  rows = np.random.default_rng(0).integers(4, size=(500, 5))
  expected = [collections.Counter(row).most_common(1)[0][0] for row in rows.tolist()]
  np.testing.assert_array_equal(nearest.vote(rows), expected)
  assert nearest.vote(np.array([[3, 1, 1, 3, 2]])).tolist() == [3]


def test_the_linear_loss_equals_its_definition():
  images, texts, image_labels, text_labels = make()
  scale = 0.7
  expected = []
  for text, label in zip(texts.astype(np.float64), text_labels, strict=True):
    scores = np.exp(scale) * images.astype(np.float64) @ text
    log_p = scores - np.log(np.exp(scores).sum())
    y = (image_labels == label) / (image_labels == label).sum()
    expected.append(-(y * log_p).sum())
  ours = nearest.linear_loss(texts, images, text_labels=text_labels, image_labels=image_labels, logit_scale=scale)
  np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_anchors_have_the_smallest_losses_in_ascending_order():
  losses, starts = np.array([3.0, 1.0, 2.0, 1.0, 9.0, 8.0], np.float32), np.array([0, 4, 6])
  assert anchors.choose(losses, starts, count=3).tolist() == [[1, 3, 2], [5, 4, -1]]
