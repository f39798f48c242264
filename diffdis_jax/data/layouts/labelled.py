"""Images with labels or captions, in place as a published layout has them, read by index.

What is here is a data source, as `data.sources` says, and besides gives a record's other fields without its image.
"""

from __future__ import annotations

import dataclasses
import operator
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from diffdis_jax.common import storage
from diffdis_jax.data.records import Unusable, read_file
from diffdis_jax.errors import Gone

# Bytes stay encoded until a loader's thread needs them; CIFAR's pickles have pixels alone.
Encoded = bytes | UInt8[np.ndarray, "h w 3"]


@runtime_checkable
class Images(Protocol):
  """Images by index: encoded bytes, or u8[h w 3]. An array of them is one."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Images that are read one by one, from whatever stands for each of them. Picklable, for the loader's processes."""

  items: Any
  read: Callable[[Any], Encoded]

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: int) -> Encoded:
    item = self.items[index]
    return storage.patiently(lambda: self.read(item), "an image of the data")


def image_files(paths: Sequence[pathlib.Path]) -> Lazy:
  """Image files. Reading one raises Unusable as `records.read_file` does."""
  return Lazy(paths, _read_listed)


def _read_listed(path: pathlib.Path) -> bytes:
  try:
    return read_file(path)
  except Unusable:
    if not path.parent.is_dir():  # of a disk that is away, rather than an image that never was there
      raise Gone(f"{path.parent} is not there") from None
    raise


def images_of(source: Any) -> Lazy:
  """The images of another source's records."""
  return Lazy(source, operator.itemgetter("image"))


@dataclasses.dataclass(frozen=True)
class Origin:
  """The place where a set was found.

  Attributes:
    layout: whose folders: `wds`, `torchvision`, `tfds`, `prepared`, or `files` of captions.
    path: of the folder.
    split: that is read; `all` where the layout has none.
    templates: prompt templates that came with the data.
  """

  layout: str
  path: str
  split: str
  templates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Named:
  """Images, and labels that count into the data's own class names, as a layout's reader finds them."""

  images: Images
  labels: Int[np.ndarray, " n"]
  classes: Sequence[str]
  origin: Origin


class _Source:
  """A source whose records are `fields`, which a subclass gives, and an image."""

  images: Images

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self.fields(index), "image": self.images[index]}

  def fields(self, index: int) -> dict[str, Any]:
    """The record without its image: labels are asked for of a whole set, whose images take minutes to read."""
    # Python's own sequences count from the end below 0, where a loader's mistake would go unseen.
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} outside of {len(self)} images")
    return self._fields(index)

  def _fields(self, index: int) -> dict[str, Any]:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Labelled(_Source):
  """A source of images with the number of their class, in the order of a set's class list, and its name."""

  images: Images
  labels: Int[np.ndarray, " n"]
  classnames: Sequence[str]
  origin: Origin

  def _fields(self, index: int) -> dict[str, Any]:
    label = int(self.labels[index])
    return {"label": label, "class": self.classnames[label], "caption": self.classnames[label]}


@dataclasses.dataclass(frozen=True)
class Captioned(_Source):
  """A source of images with one caption or more."""

  images: Images
  captions: Sequence[tuple[str, ...]]
  origin: Origin

  def _fields(self, index: int) -> dict[str, Any]:
    # The first one is the caption, by the convention of retrieval; training samples from all of them.
    return {"caption": self.captions[index][0], "captions": list(self.captions[index])}
