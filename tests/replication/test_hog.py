"""Test the baseline of nearest edges and colours against plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest

from replication import hog

pytestmark = pytest.mark.slow


def smooth(seed: int, n: int = 3) -> np.ndarray:
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (n, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
  return np.clip(coarse + rng.integers(-20, 21, coarse.shape), 0, 255).astype(np.uint8)


def by_loops(image: np.ndarray) -> np.ndarray:
  """Compute Dalal and Triggs' histograms of one image, pixel by pixel."""
  x = np.sqrt(image.astype(np.float64) / 255)
  cells = np.zeros((4, 4, 9))
  for i in range(32):
    for j in range(32):
      best = (0.0, 0.0)
      for channel in range(3):
        dy = x[i + 1, j, channel] - x[i - 1, j, channel] if 0 < i < 31 else 0.0
        dx = x[i, j + 1, channel] - x[i, j - 1, channel] if 0 < j < 31 else 0.0
        length = (dx * dx + dy * dy) ** 0.5
        if length > best[0]:
          best = (length, np.degrees(np.arctan2(dy, dx)) % 180)
      cells[i // 8, j // 8, min(int(best[1] // 20), 8)] += best[0]
  parts = []
  for i in range(3):
    for j in range(3):
      block = cells[i : i + 2, j : j + 2].ravel()
      block = np.minimum(block / np.linalg.norm(block), 0.2)
      parts.append(block / np.linalg.norm(block))
  return np.concatenate(parts)


def test_histograms_are_those_of_loops():
  images = smooth(0)
  np.testing.assert_allclose(hog.gradients(images), np.stack([by_loops(image) for image in images]), atol=2e-3)
  corner = images[0, 8:16, 24:32].mean((0, 1))
  np.testing.assert_allclose(hog.colours(images)[0].reshape(4, 4, 3)[1, 3], corner, rtol=1e-5)


def test_the_nearest_is_by_edges_and_a_quarter_of_colours_about_the_training_images_mean():
  queries, keys = smooth(3, 40), smooth(4, 20)
  cosines = lambda a, b: a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
  cells = lambda images: images.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)).reshape(len(images), -1)
  centre = cells(keys).mean(0)
  edges = cosines(hog.gradients(queries), hog.gradients(keys))
  colours = cosines(cells(queries) - centre, cells(keys) - centre)
  expected = (edges + colours / 4).argmax(1)
  np.testing.assert_array_equal(hog.nearest(queries, keys), expected)
  for other in (edges, edges - colours / 4, edges + cosines(cells(queries), cells(keys)) / 4):
    assert (other.argmax(1) != expected).any()
