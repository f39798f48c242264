"""Images with labels or captions, in place as a published layout has them, read by index.

What is here is a data source, as `data.sources` says, and besides gives a record's other fields without its image.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from diffdis_jax.data.records import MOST_BYTES, read_file
from diffdis_jax.data.tars import Member

Encoded = bytes | UInt8[np.ndarray, "h w 3"]


@runtime_checkable
class Images(Protocol):
  """Images by index: encoded bytes, or u8[h w 3]."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files. Reading one raises Unusable as `records.read_file` does."""

  paths: Sequence[pathlib.Path]

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> bytes:
    return read_file(self.paths[index])


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Decoded images."""

  pixels: UInt8[np.ndarray, "n h w 3"]

  def __len__(self) -> int:
    return len(self.pixels)

  def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    return self.pixels[index]


@dataclasses.dataclass(frozen=True)
class Members:
  """Image files inside uncompressed tars. Reading one raises Unusable as `tars.Member.read` does."""

  members: Sequence[Member]

  def __len__(self) -> int:
    return len(self.members)

  def __getitem__(self, index: int) -> bytes:
    return self.members[index].read(MOST_BYTES)


@dataclasses.dataclass(frozen=True)
class Stored:
  """The images of another source's records."""

  records: Any

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Encoded:
    return self.records[index]["image"]


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a set was found.

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
  """What a layout's reader finds: images, and labels that count into the data's own class names."""

  images: Images
  labels: Int[np.ndarray, " n"]
  classes: Sequence[str]
  origin: Origin


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A source of images with the number of their class, in the order of a set's class list, and its name."""

  images: Images
  labels: Int[np.ndarray, " n"]
  classnames: Sequence[str]
  origin: Origin

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self.fields(index), "image": self.images[index]}

  def fields(self, index: int) -> dict[str, Any]:
    """The record without its image."""
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} outside of {len(self)} images")
    label = int(self.labels[index])
    return {"label": label, "class": self.classnames[label], "caption": self.classnames[label]}


@dataclasses.dataclass(frozen=True)
class Captioned:
  """A source of images with one caption or more."""

  images: Images
  captions: Sequence[tuple[str, ...]]
  origin: Origin

  def __len__(self) -> int:
    return len(self.captions)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self.fields(index), "image": self.images[index]}

  def fields(self, index: int) -> dict[str, Any]:
    """The record without its image."""
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} outside of {len(self)} images")
    return {"caption": self.captions[index][0], "captions": list(self.captions[index])}
