"""Images of a prepared folder with their queries, for the tab *search*."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base

SEED = 0  # of the images' noise


class Record(NamedTuple):
  """An image's central square, and its caption, class or key."""

  image: UInt8[np.ndarray, "s s 3"]
  name: str


class Index:
  """`num_images` of a source, or all, with their queries, which a thread embeds while requests are answered.

  Raises UserError: the source has no record.
  """

  def __init__(self, sampler: StepSampler, source: Any, num_images: int | None):
    self._sampler, self.source = sampler, source
    self.indices = base.subset(len(source), num_images)
    self._parts: list[Float[np.ndarray, "b d"]] = []
    self._error = ""

  def fill(self) -> None:
    """Embed all, batch by batch, until the page ends. Searches report what cannot be read."""
    size, images = self._sampler.model.batch_size, self._images()
    try:
      for start in range(0, len(images), size):
        batch = images[np.arange(start, min(start + size, len(images)))]
        self._parts.append(self._sampler.embed_images(batch, seed=SEED + start))
      logging.info("%d images can be searched", len(images))
    except (UserError, OSError, RuntimeError) as error:
      self._error = str(error)
      if not self._sampler.closed.is_set():
        logging.warning("the search ends after %d images: %s", sum(map(len, self._parts)), error)

  def start(self) -> threading.Thread:
    """Embed all in a thread."""
    thread = threading.Thread(target=self.fill, name="search")
    thread.start()
    return thread

  def nearest(self, query: Float[np.ndarray, " d"], count: int) -> dict[int, float]:
    """Return the places of the images with the highest inner products, best first, and these, of those that are
    embedded by now. Raises UserError: none is."""
    if not self._parts:
      raise UserError(self._error or "no image is embedded yet; try again in a moment")
    scores = np.concatenate([*self._parts]) @ query
    return {int(place): float(scores[place]) for place in np.argsort(-scores, kind="stable")[:count]}

  def record(self, place: int) -> Record:
    """Read the image at this place among those that are searched. Raises UserError: it cannot be read."""
    try:
      fields, image = base.fields(self.source, self.indices[place]), self._images()[np.array([place])][0]
    except OSError as error:  # of storage that was there when the page began
      raise UserError(f"an image cannot be read: {error}; try again later") from error
    names = (value for name in ("caption", "class", "key") if isinstance(value := fields.get(name), str))
    return Record(image, next(names, ""))

  def state(self) -> str:
    """Say how many images are embedded."""
    done, total = sum(map(len, self._parts)), len(self.indices)
    if done == total:
      return f"{total:,} images are searched."
    return f"{done:,} of {total:,} images are searched so far. {self._error}".strip()

  def _images(self) -> base.Images:
    return base.Images(self.source, self.indices, self._sampler.network.image_size)
