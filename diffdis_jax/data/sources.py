"""Random access sources of captioned images: `len(source)`, `source[i]` -> {'image', 'caption', metadata fields...}.

`image` is a u8[h w 3] array, or bytes still to be decoded.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from diffdis_jax.data import shapes

NAMES = ("shapes", "pairs")


class Source(Protocol):
  """What `make` returns."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def make(
  *,
  name: str,
  image_size: int,
  split: str = "train",
  path: str | os.PathLike[str] = "",
  seed: int = 0,
  num_images: int | None = None,
) -> Source:
  """The source of this name.

  Args:
    name: `shapes`, rendered by index, or `pairs`, a folder written by prepare_data.
    image_size: side in pixels at which shapes are rendered. Stored images keep theirs until the loader resizes them.
    split: of `shapes`: train, test, unseen, all. Of `pairs`: what the folder has.
    path: the prepared folder; unused by `shapes`.
    seed: of the rendered shapes.
    num_images: number of shapes; by default shapes.SPLITS. Of `pairs`: only the first so many.

  Raises:
    UserError: unknown name, unknown split, or a path that holds no prepared data set.
  """
  if name not in NAMES:
    _refuse(f"unknown data source {name!r}; there are {', '.join(NAMES)}")
  if num_images is not None and num_images < 1:
    _refuse(f"num_images is {num_images}; at least 1, or None for all")
  if name == "pairs":
    return _make_pairs(path, split=split, num_images=num_images)
  if split not in shapes.SPLITS:
    _refuse(f"shapes has no split {split!r}; there are {', '.join(shapes.SPLITS)}")
  return shapes.Shapes(split=split, image_size=image_size, seed=seed, num_images=num_images)


class Pairs:
  """Captioned images as prepare_data stored them; the fields of the json beside an image become metadata fields."""

  def __init__(self, records: Any, num_images: int | None = None):
    self._records = records
    self._num_images = len(records) if num_images is None else min(num_images, len(records))

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self._num_images:
      raise IndexError(f"index {index} outside of {self._num_images} pairs")
    record: Mapping[str, bytes] = self._records[index]
    metadata = json.loads(record["metadata"])
    return {**metadata, "image": record["image"], "caption": record["caption"].decode(), "key": record["key"].decode()}


def _make_pairs(path: str | os.PathLike[str], *, split: str, num_images: int | None) -> Pairs:
  import tensorflow_datasets as tfds  # here, since it takes half a second and `shapes` does without

  if not (pathlib.Path(path) / "dataset_info.json").is_file() or not str(path):
    _refuse(f"no prepared data set in {str(path)!r}; write one with python -m diffdis_jax.prepare_data pairs")
  builder = tfds.builder_from_directory(path)
  if split not in builder.info.splits:
    _refuse(f"{path} has no split {split!r}; there are {', '.join(sorted(builder.info.splits))}")
  records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
  return Pairs(records, num_images)


def _refuse(message: str) -> NoReturn:
  from diffdis_jax.structs import UserError  # here, since it imports jax, which data workers go without

  raise UserError(message)
