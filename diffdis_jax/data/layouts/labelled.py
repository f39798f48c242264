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


def check_index(index: int, source: Any) -> None:
  """Raise IndexError: a source has no such record. Python's own sequences count from the end below 0, where a loader's
  mistake would go unseen."""
  if not 0 <= index < len(source):
    raise IndexError(f"index {index} outside of {len(source)} images")


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A source of images with the number of their class, in the order of a set's class list, and its name."""

  images: Sequence[bytes] | Lazy
  labels: Int[np.ndarray, " n"]
  classnames: Sequence[str]
  origin: Origin

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self.fields(index), "image": self.images[index]}

  def fields(self, index: int) -> dict[str, Any]:
    """Return the record without its image: labels are asked for of a whole set, whose images take minutes to read."""
    check_index(index, self)
    label = int(self.labels[index])
    return {"label": label, "class": self.classnames[label], "caption": self.classnames[label]}


@dataclasses.dataclass(frozen=True)
class Captioned:
  """A source of images with one caption or more."""

  images: Sequence[bytes] | Lazy
  captions: Sequence[tuple[str, ...]]
  origin: Origin

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self.fields(index), "image": self.images[index]}

  def fields(self, index: int) -> dict[str, Any]:
    """Return the record without its image."""
    check_index(index, self)
    # The first one is the caption, by the convention of retrieval; training samples from all of them.
    return {"caption": self.captions[index][0], "captions": list(self.captions[index])}
