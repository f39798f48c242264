"""Folders that TensorFlow Datasets or prepare_data wrote, with records in random access."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffdis_jax.data import records
from diffdis_jax.data.layouts.labelled import Captioned, Named, Origin, images_of
from diffdis_jax.errors import UserError

INFO = "dataset_info.json"
PREFERRED = ("test", "val", "validation")  # of prepare_data's splits


def find(path: pathlib.Path) -> pathlib.Path | None:
  """The folder with a data set in it: this one, or NAME/VERSION, NAME/CONFIG/VERSION as TFDS writes, newest version."""
  found = [file.parent for depth in (INFO, f"*/{INFO}", f"*/*/{INFO}") for file in path.glob(depth)]
  return max(found, key=_version, default=None)


def _version(path: pathlib.Path) -> list[int]:
  parts = path.name.split(".")
  return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []


def read(path: pathlib.Path, *, split: str, called: str) -> Named:
  """Images and labels.

  Args:
    path: that `find` found.
    split: of TFDS to read, or a part of one, such as "train[80%:]". Of prepare_data's it is the first of `PREFERRED`.
    called: what that is for the set, `test` or `val`.

  Raises:
    UserError: no such records, none in random access, or no class names.
  """
  info = records.read_info(path)
  if "metadata" in info.features:
    return _prepared(path, info)
  if split.partition("[")[0] not in info.splits:
    raise UserError(f"{path} has no split {split}, only {', '.join(sorted(info.splits))}")
  # Names are needed, since numbers alone do not say in which order the builder counted.
  label: Any = info.features["label"] if "label" in info.features else None
  names = label.names if label is not None and hasattr(label, "names") else None
  if "image" not in info.features or not names:
    raise UserError(f"{path} has no images with a `label` of named classes; its fields are {', '.join(info.features)}")
  # All labels at once and no image: decoding is left out, and a whole set is measured anyway.
  stored = records.open_stored(path, split=split)
  labels = np.array([int(record["label"]) for record in _all_of(stored, path)], np.int64)
  if labels.size and not 0 <= labels.min() <= labels.max() < len(names):
    raise UserError(f"{path} has labels from {labels.min()} to {labels.max()}, but {len(names)} classes")
  return Named(images_of(stored), labels, names, Origin("tfds", str(path), called))


def read_captions(path: pathlib.Path) -> Captioned:
  """Read a folder of captioned images that prepare_data wrote. Raises UserError: it is none."""
  info = records.read_info(path)
  if "metadata" not in info.features:
    raise UserError(f"{path} was not written by prepare_data, which captions are read of: prepare_data coco, flickr30k")
  split = _split(path, info)
  pairs = records.open_pairs(path, split=split, num_images=None)
  captions = [tuple(records.captions_of(record)) or (record["caption"],) for record in _all_of(pairs, path)]
  return Captioned(images_of(pairs), captions, Origin("prepared", str(path), split))


def _prepared(path: pathlib.Path, info: Any) -> Named:
  """Read a set of class folders that prepare_data wrote, whose `class` is the folder's name."""
  split = _split(path, info)
  pairs = records.open_pairs(path, split=split, num_images=None)
  names = [record.get("class") for record in _all_of(pairs, path)]
  if not all(isinstance(name, str) for name in names):
    raise UserError(f"{path} has records without `class`; write it by prepare_data folder, of class folders")
  classes, labels = np.unique(np.array(names, np.str_), return_inverse=True)
  origin = Origin("prepared", str(path), "all" if split == "train" else split)
  return Named(images_of(pairs), labels.astype(np.int64), classes.tolist(), origin)


def _split(path: pathlib.Path, info: Any) -> str:
  """Choose the split of a prepared folder. Raises UserError: it has no split to measure on."""
  if [*info.splits] == ["train"]:  # as prepare_data calls what has no splits
    return "train"
  for name in PREFERRED:
    if name in info.splits:
      return name
  raise UserError(f"{path} has the splits {', '.join(sorted(info.splits))}, none of {', '.join(PREFERRED)}")


def _all_of(source: Any, path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Read all records. Raises UserError: one of them is damaged; a figure is of all or of none."""
  for index in range(len(source)):
    try:
      record = source[index]
    except records.Unusable as error:
      raise UserError(f"{path}: record {index} cannot be used: {error}; copy it again, or prepare it again") from error
    yield record
