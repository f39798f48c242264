"""Test the share of copies against loops over whole numbers."""

from __future__ import annotations

import numpy as np
import pytest

from replication import copies

pytestmark = pytest.mark.slow


def brute_force(images, labels, training, training_labels) -> float:
  """Compute the share by its definition, in Python's whole numbers."""
  distance = lambda a, b: sum((int(x) - int(y)) ** 2 for x, y in zip(a.flat, b.flat, strict=True))
  nearer = []
  for image, label in zip(images, labels, strict=True):
    own = [x for x, k in zip(training, training_labels, strict=True) if k == label]
    pairs = [distance(a, b) for i, a in enumerate(own) for b in own[:i]]
    if pairs:
      nearer.append(min(distance(image, x) for x in training) < min(pairs))
  return sum(nearer) / len(nearer)


def test_the_share_is_that_of_brute_force(monkeypatch):
  """The last of five classes has one image and does not count. There are several blocks of rows."""
  monkeypatch.setattr(copies, "ROWS", 7)
  rng = np.random.default_rng(0)
  labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4])
  centres = rng.integers(60, 196, (5, 4, 4, 3))
  painted = lambda k: (centres[k] + rng.integers(-60, 61, (len(k), 4, 4, 3))).astype(np.uint8)
  training, asked = painted(labels), rng.integers(0, 5, 40)
  images = painted(asked)
  images[:15] = np.clip(training[rng.integers(0, 11, 15)] + rng.integers(0, 30, (15, 4, 4, 3)), 0, 255)
  share = copies.OwnDistances(training, labels, num_classes=5).share_nearer(images, asked)
  assert share == brute_force(images, asked, training, labels)
  assert 0.1 < share < 0.9


def test_distances_are_exact():
  """White images that differ by 1 in one byte would be hundreds apart in f32."""
  white = np.full((1, 32, 32, 3), 255, np.uint8)
  other = white.copy()
  other[0, 5, 5, 1] = 254
  assert copies.squared_distances(white, np.concatenate([white, other])).tolist() == [[0.0, 1.0]]
