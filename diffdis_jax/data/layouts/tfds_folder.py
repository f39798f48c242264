"""Sets to measure on that prepare_data wrote: TFDS folders of ArrayRecord files."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from diffdis_jax.data import records
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.data.layouts.class_lists import ClassList
from diffdis_jax.data.layouts.labelled import Captioned, Labelled, Origin, images_of
from diffdis_jax.errors import UserError

MARK = INFO = "dataset_info.json"  # the file by which such a folder is known
PREFERRED = ("test", "val", "validation")  # splits


def read(path: pathlib.Path, known: ClassList) -> Labelled:
  """Read images and labels, which are those of the field `class`. Raises UserError: no such records, or other
  classes."""
  split = _split(path)
  pairs = records.open_pairs(path, split=split, num_images=None)
  names = [record.get("class") for record in _all_of(pairs, path)]
  if not all(isinstance(name, str) for name in names):
    raise UserError(f"{path} has records without `class`; write it by prepare_data torchvision {known.set_name}")
  classes, labels = np.unique(np.array(names, np.str_), return_inverse=True)
  places = class_lists.match(classes.tolist(), known, where=str(path))
  # What prepare_data calls `train` has no splits.
  origin = Origin("prepared", str(path), "all" if split == "train" else split)
  return Labelled(images_of(pairs), places[labels], known.classnames, origin)


def read_captions(path: pathlib.Path) -> Captioned:
  """Read images and all of their captions. Raises UserError: no such records."""
  split = _split(path)
  pairs = records.open_pairs(path, split=split, num_images=None)
  captions = [tuple(records.captions_of(record)) or (record["caption"],) for record in _all_of(pairs, path)]
  return Captioned(images_of(pairs), captions, Origin("prepared", str(path), split))


def _split(path: pathlib.Path) -> str:
  """Choose the split that is measured. Raises UserError: there is none."""
  splits = records.read_info(path).splits
  if [*splits] == ["train"]:  # as prepare_data calls what has no splits
    return "train"
  if found := [name for name in PREFERRED if name in splits]:
    return found[0]
  raise UserError(f"{path} has the splits {', '.join(sorted(splits))}, none of {', '.join(PREFERRED)}")


def _all_of(source: Any, path: pathlib.Path) -> list[dict[str, Any]]:
  """Read all records, without their images. Raises UserError: one is damaged; a figure is of all or of none."""
  found = []
  for index in range(len(source)):
    try:
      record = source[index]
    except records.Unusable as error:
      raise UserError(f"{path}: record {index} cannot be used: {error}; copy it again, or prepare it again") from error
    found.append({name: value for name, value in record.items() if name != "image"})
  return found
