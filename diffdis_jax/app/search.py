"""Images of a prepared folder with their queries, for the tab *search*."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base

SEED = 0  # of the images' noise


class Hit(NamedTuple):
  """A record of the folder by its place among those that are searched, with ⟨ê_0, e⟩ or ⟨ê_0, ê_0'⟩."""

  place: int
  score: float


class Record(NamedTuple):
  """An image's central square, and what its record calls it."""

  image: UInt8[np.ndarray, "s s 3"]
  name: str


class Index:
  """Images of a source with their queries, which a thread embeds while requests are answered.

  Args:
    sampler: whose model embeds.
    source: as `data.sources.open_source` gives it.
    num_images: that are searched, always the same ones; None for all.

  Raises:
    UserError: the source has no record.
  """

  def __init__(self, sampler: StepSampler, source: Any, num_images: int | None):
    self._sampler, self.source = sampler, source
    self.indices = base.subset(len(source), num_images)
    # The first batch shows how wide queries are.
    self._queries = np.zeros((len(self.indices), 0), np.float32)
    self.embedded = 0
    self._error = ""
    self._begun = threading.Event()  # some are embedded, or none will be

  def fill(self) -> None:
    """Embed all, a batch a turn of the model. What cannot be read ends it, and searches then say so."""
    size = self._sampler.model.batch_size
    try:
      for start in range(0, len(self.indices), size):
        if self._sampler.closed.is_set():
          return
        images = base.Images(self.source, self.indices[start : start + size], self._sampler.network.image_size)
        # Read before the model's turn, for which requests would wait as long as for slow storage.
        queries = self._sampler.embed_images(images[np.arange(len(images))], seed=SEED + start)
        if not self.embedded:
          self._queries = np.zeros((len(self.indices), queries.shape[1]), np.float32)
        # In this order: other threads read the first `embedded` rows at any time.
        self._queries[start : start + len(queries)] = queries
        self.embedded = start + len(queries)
        self._begun.set()
      logging.info("%d images can be searched", self.embedded)
    except (UserError, OSError, RuntimeError) as error:
      self._error = str(error)
      if not self._sampler.closed.is_set():
        logging.warning("the search ends after %d images: %s", self.embedded, error)
    finally:
      # After an error too: else each search would wait for all of its time.
      self._begun.set()

  def nearest(self, query: Float[np.ndarray, " d"], count: int, *, seconds: float = 0.0) -> list[Hit]:
    """Return the images with the highest inner products, best first, of those that are embedded by now.

    Args:
      seconds: to wait for the first ones.

    Raises:
      UserError: none is embedded yet.
    """
    self._begun.wait(seconds)
    done = self.embedded
    if not done:
      raise UserError(self._error or "no image is embedded yet; try again in a moment")
    # `done` was read once: the other thread may have embedded more since.
    scores = self._queries[:done] @ query
    return [Hit(int(place), float(scores[place])) for place in np.argsort(-scores, kind="stable")[:count]]

  def record(self, place: int) -> Record:
    """Read the image at this place among those that are searched. Raises UserError: it cannot be read."""
    images = base.Images(self.source, self.indices, self._sampler.network.image_size)
    try:
      return Record(images[np.array([place])][0], name_of(base.fields(self.source, self.indices[place])))
    except OSError as error:  # of storage that was there when the page began
      raise UserError(f"an image cannot be read: {error}; try again later") from error

  def state(self) -> str:
    """Say how far embedding is."""
    done, total = self.embedded, len(self.indices)
    if done == total:
      return f"{total:,} images are searched."
    return f"{done:,} of {total:,} images are searched so far. {self._error}".strip()


def name_of(record: Mapping[str, Any]) -> str:
  """Return a record's caption, or else its class or its key."""
  return next((value for field in ("caption", "class", "key") if isinstance(value := record.get(field), str)), "")
