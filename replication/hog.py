"""Classify without learning: give an image the class of the training image with the most similar edges and colours.

This baseline shows how easy the icons of a held-out artist are. Without it, a model's accuracies on different artists
cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from diffdis_jax.config.section import field
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from replication.label_judge import text_labels

SIDE = 32  # in pixels: images are compared at this size
CELL, BINS, BLOCK = 8, 9, 2  # pixels of a cell, directions within 180°, and cells of a block along each side
CLIP = 0.2  # limit of a block's values between two normalisations to length 1 (Dalal and Triggs, L2-Hys)
COLOUR_WEIGHT = 0.25  # weight of the cosine of colours; that of edges has weight 1


@base.settings()
class Hog(base.Evaluation):
  """Task `hog`: top-1 of the nearest training image, by histograms of oriented gradients and mean colours.

  Source: Dalal and Triggs, 2005, for the histograms.
  """

  task = "nearest_neighbour_classification"

  data: Mapping[str, Any] = field(help="section of a data source")
  train_split: str = field("train", help="split of the same data among whose images the nearest is looked for")
  label_field: str = field("label", help="record's field with the class name")
  num_images: int | None = field(None, help="images to measure, those that zero_shot measures; by default all")

  def open(self) -> None:
    if self.train_split == self.data.get("split", "train"):
      raise UserError(
        f"hog would look for the nearest image in the split {self.train_split}, which it measures; give another"
      )
    self.source = sources.open_source(**self.data)
    self._indices = base.subset(len(self.source), self.num_images)
    self._train = base.open_split(self.data, self.train_split)
    self._labels = text_labels(self.source, self.label_field)[self._indices]
    self._known = text_labels(self._train, self.label_field)
    self._seen = np.isin(self._labels, self._known)
    if not self._seen.any():
      raise UserError(
        f"no class of these images is in the split {self.train_split}, among which the nearest is looked for"
      )

  def protocol(self, inference: Any) -> dict[str, Any]:
    del inference  # the model is not used
    counts = {"num_images": len(self._labels), "num_training_images": len(self._known)}
    return {"train_split": self.train_split, **counts}

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1 on all images, and acc1_seen on those whose class the training images have."""
    del inference, params
    queries = base.Images(self.source, self._indices, SIDE)[np.arange(len(self._indices))]
    keys = base.Images(self._train, np.arange(len(self._known)), SIDE)[np.arange(len(self._known))]
    is_right = self._known[nearest(queries, keys)] == self._labels
    return {"acc1": float(is_right.mean()), "acc1_seen": float(is_right[self._seen].mean())}


def nearest(queries: UInt8[np.ndarray, "n s s 3"], keys: UInt8[np.ndarray, "m s s 3"]) -> np.ndarray:
  """Return the index of each query's nearest key, by the cosine of edges plus a quarter of the cosine of colours."""
  # Subtract the training images' mean colours, since nearly all icons have a white background.
  centre = colours(keys).mean(axis=0)
  edges = unit(gradients(queries)) @ unit(gradients(keys)).T
  return (edges + COLOUR_WEIGHT * unit(colours(queries) - centre) @ unit(colours(keys) - centre).T).argmax(axis=1)


def gradients(images: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n d"]:
  """Return histograms of oriented gradients in f32, in overlapping blocks of 2 x 2 cells, each of length about 1."""
  # The square root evens out contrast. A pixel takes the gradient of its strongest channel.
  x = np.sqrt(images.astype(np.float32) / 255)
  dy, dx = np.zeros_like(x), np.zeros_like(x)
  dy[:, 1:-1], dx[:, :, 1:-1] = x[:, 2:] - x[:, :-2], x[:, :, 2:] - x[:, :, :-2]
  strongest = np.hypot(dx, dy).argmax(axis=-1)[..., None]
  dy, dx = (np.take_along_axis(gradient, strongest, axis=-1)[..., 0] for gradient in (dy, dx))
  length, angle = np.hypot(dx, dy), np.degrees(np.arctan2(dy, dx)) % 180
  bins = np.minimum((angle * BINS / 180).astype(int), BINS - 1)
  of_bins = (length[..., None] * (bins[..., None] == np.arange(BINS))).astype(np.float32)
  n, cells = len(x), x.shape[1] // CELL
  histograms = of_bins.reshape(n, cells, CELL, cells, CELL, BINS).sum(axis=(2, 4))
  places = [(i, j) for i in range(cells - BLOCK + 1) for j in range(cells - BLOCK + 1)]
  blocks = [histograms[:, i : i + BLOCK, j : j + BLOCK].reshape(n, -1) for i, j in places]
  return np.concatenate([unit(np.minimum(unit(block), CLIP)) for block in blocks], axis=1)


def colours(images: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n d"]:
  """Return the mean colour of each cell, f32."""
  n, cells = len(images), images.shape[1] // CELL
  return images.astype(np.float32).reshape(n, cells, CELL, cells, CELL, 3).mean(axis=(2, 4)).reshape(n, -1)


def unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Scale rows to length 1; a row of zeros stays zero."""
  return x / np.sqrt((x**2).sum(axis=1, keepdims=True) + 1e-10)
