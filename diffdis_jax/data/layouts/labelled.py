"""Images with labels or captions, read by index in the place where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from diffdis_jax.common import storage


@runtime_checkable
class Source(Protocol):
  """A data source's records."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


@runtime_checkable
class LabelledSource(Source, Protocol):
  """A source whose classes are known without reading an image."""

  @property
  def labels(self) -> Int[np.ndarray, " n"]: ...

  @property
  def classnames(self) -> Sequence[str]: ...


class Origin(NamedTuple):
  """The place where a set was found."""

  layout: str  # `wds`, `prepared` or `long_tailed`
  path: str  # its folder
  split: str  # that is read, `all` where the set has none


@dataclasses.dataclass(frozen=True)
class Published:
  """A data source of images, whose other fields a subclass knows without reading them."""

  images: Any  # encoded, or whatever stands for each of them
  origin: Origin = dataclasses.field(kw_only=True)
  read: Callable[[Any], bytes] = dataclasses.field(default=bytes, kw_only=True)  # the bytes of one of `images`

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    image = lambda: self.read(self.images[index])
    return {**self.fields(index), "image": storage.patiently(image, "an image of the data")}

  def fields(self, index: int) -> dict[str, Any]:
    """Return the record without its image: labels are asked for of a whole set, whose images take minutes to read."""
    # Python's own sequences count from the end below 0, where a loader's mistake would go unseen.
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} outside of {len(self)} images")
    return {}


@dataclasses.dataclass(frozen=True)
class Labelled(Published):
  """A source of images with the number of their class, in the order of a set's class list, and its name."""

  labels: Int[np.ndarray, " n"]
  classnames: Sequence[str]

  def fields(self, index: int) -> dict[str, Any]:
    label = int(self.labels[index])
    name = self.classnames[label]
    return {**super().fields(index), "label": label, "class": name, "caption": name}


@dataclasses.dataclass(frozen=True)
class Captioned(Published):
  """A source of images with one caption or more."""

  captions: Sequence[tuple[str, ...]]

  def fields(self, index: int) -> dict[str, Any]:
    # The first one is the caption, by the convention of retrieval; training samples from all of them.
    return {**super().fields(index), "caption": self.captions[index][0], "captions": list(self.captions[index])}
