"""Images with labels or captions, read by index in the place where they lie.

What is here is a data source, as `data.sources` says, and besides gives a record's other fields without its image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from diffdis_jax.common import storage


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Encoded images that are read one by one, from whatever stands for each of them."""

  items: Any
  read: Callable[[Any], bytes]

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: int) -> bytes:
    item = self.items[index]
    return storage.patiently(lambda: self.read(item), "an image of the data")


@dataclasses.dataclass(frozen=True)
class Origin:
  """The place where a set was found.

  Attributes:
    layout: `wds`, `prepared` or `long_tailed`.
    path: of the folder.
    split: that is read; `all` where the set has none.
    templates: prompt templates that came with the data.
  """

  layout: str
  path: str
  split: str
  templates: tuple[str, ...] = ()


class _Set:
  """A source of images, whose other fields a subclass knows without reading them."""

  images: Any

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self.fields(index), "image": self.images[index]}

  def fields(self, index: int) -> dict[str, Any]:
    """Return the record without its image: labels are asked for of a whole set, whose images take minutes to read."""
    # Python's own sequences count from the end below 0, where a loader's mistake would go unseen.
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} outside of {len(self)} images")
    return {}


@dataclasses.dataclass(frozen=True)
class Labelled(_Set):
  """A source of images with the number of their class, in the order of a set's class list, and its name."""

  images: Sequence[bytes] | Lazy
  labels: Int[np.ndarray, " n"]
  classnames: Sequence[str]
  origin: Origin

  def fields(self, index: int) -> dict[str, Any]:
    label = int(self.labels[index])
    name = self.classnames[label]
    return {**super().fields(index), "label": label, "class": name, "caption": name}


@dataclasses.dataclass(frozen=True)
class Captioned(_Set):
  """A source of images with one caption or more."""

  images: Sequence[bytes] | Lazy
  captions: Sequence[tuple[str, ...]]
  origin: Origin

  def fields(self, index: int) -> dict[str, Any]:
    # The first one is the caption, by the convention of retrieval; training samples from all of them.
    return {**super().fields(index), "caption": self.captions[index][0], "captions": list(self.captions[index])}
