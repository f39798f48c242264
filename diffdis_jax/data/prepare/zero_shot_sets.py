"""A published zero-shot set, in whatever layout it lies, with the bytes of its images as they are."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from diffdis_jax.data import image_files
from diffdis_jax.data.layouts import class_lists, find
from diffdis_jax.data.layouts.labelled import Labelled
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.builder import CaptionedImages
from diffdis_jax.data.prepare.pairs import RawPair
from diffdis_jax.data.prepare.parts import Part
from diffdis_jax.data.records import Unusable


class ZeroShotSet(CaptionedImages):
  """Images of a zero-shot set."""

  name = "zero_shot_set"
  DESCRIPTION = (
    "The images of a published zero-shot set. The caption is the class's name as OpenAI's prompts have it; label, its"
    " number there, and class, its name in the data, are fields of a record."
  )


@dataclasses.dataclass
class SetPart:
  """Some of a set's images."""

  name: str
  split: str
  root: pathlib.Path
  set_name: str
  first: int
  count: int
  truncated: bool = False

  def identity(self) -> list[Any]:
    source = _open(self.root, self.set_name)
    return [self.set_name, source.origin.layout, len(source), self.first, self.count]

  def __iter__(self) -> Iterator[RawPair]:
    source, known = _open(self.root, self.set_name), class_lists.load()[self.set_name]
    # `class` is the data's own name: what measures the prepared set looks it up as in the published one.
    names = known.names_in_data or known.classnames
    for index in range(self.first, self.first + self.count):
      fields = source.fields(index)
      metadata = {"label": fields["label"], "class": names[fields["label"]]}
      try:
        image = source.images[index]
      except Unusable:
        image = None  # which the preparation counts, as of any source
      # Lossless: CIFAR's 32 px would not survive a JPEG.
      data = image_files.png(Image.fromarray(image)) if isinstance(image, np.ndarray) else image
      yield RawPair(f"{index:08d}", data, fields["caption"].encode(), json.dumps(metadata).encode())


def find_parts(set_name: str, source: pathlib.Path) -> list[Part]:
  """Find the parts of the set of this name under `source`, by `data.layouts.find`. A set without splits becomes
  `train`.

  Raises:
    UserError: no such folder, or no such set in it.
  """
  parts.check_folder(source, f"the folder of data sets in which {set_name} lies")
  found = _open(source, set_name)
  split = "train" if found.origin.split == "all" else found.origin.split
  starts = range(0, len(found), parts.ITEMS)
  return [
    SetPart(f"{split}-{i:05d}", split, source, set_name, first, min(parts.ITEMS, len(found) - first))
    for i, first in enumerate(starts)
  ]


@functools.lru_cache(maxsize=1)  # by each process, for all of its parts
def _open(root: pathlib.Path, set_name: str) -> Labelled:
  found = find.open_set(root, set_name)
  assert isinstance(found, Labelled)
  return found
