"""Count how many images are nearer to a training image than training images of one class are to each other.

A judge that was trained on a generator's training images names copies of them correctly, so this share belongs beside
its accuracy. Distances are Euclidean, over all pixels and channels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt8

ROWS = 256  # number of images whose distances to all others are in memory at a time


def squared_distances(
  images: UInt8[np.ndarray, "n h w 3"], others: UInt8[np.ndarray, "m h w 3"]
) -> Float[np.ndarray, "n m"]:
  """Return exact squared distances: f64 holds the sums of products of bytes, which are whole numbers."""
  a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (images, others))
  return (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T


class OwnDistances:
  """The least distance between two training images of each class.

  Args:
    images: all training images.
    labels: their classes.
    num_classes: number of classes, including those without images.
  """

  def __init__(self, images: UInt8[np.ndarray, "m h w 3"], labels: Int[np.ndarray, " m"], *, num_classes: int):
    self._images = images
    self._least = np.full(num_classes, np.nan)
    for k in np.unique(labels):
      # This distance is how near two images of a class in different styles are. An image nearer than that to a training
      # image shares more with it than the class.
      own = squared_distances(images[labels == k], images[labels == k])
      if len(own) > 1:
        self._least[k] = own[np.triu_indices(len(own), 1)].min()

  def share_nearer(self, images: UInt8[np.ndarray, "n h w 3"], labels: Int[np.ndarray, " n"]) -> float | None:
    """Return the share of images that are nearer to some training image than any two training images of their own class
    are to each other.

    Images of a class with fewer than two training images are left out; None if that leaves none.
    """
    # A class with one image has no distance within the class.
    judged = ~np.isnan(self._least[labels])
    if not judged.any():
      return None
    images, least = images[judged], self._least[labels[judged]]
    # Go block by block, since the distances of all images to all others may not fit in memory.
    blocks = range(0, len(images), ROWS)
    nearest = [squared_distances(images[start : start + ROWS], self._images).min(axis=1) for start in blocks]
    return float((np.concatenate(nearest) < least).mean())
