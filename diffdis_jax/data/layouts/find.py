"""Find a set under a folder of data sets: what prepare_data wrote, or CLIP_benchmark's tars."""

from __future__ import annotations

import operator
import pathlib
from typing import Any

import numpy as np

from diffdis_jax.data import records
from diffdis_jax.data.layouts import class_lists, wds_folder
from diffdis_jax.data.layouts.class_lists import ClassList
from diffdis_jax.data.layouts.labelled import Captioned, Labelled, Lazy, Origin
from diffdis_jax.errors import UserError

LABELLED = (
  *("cifar10", "cifar100", "caltech101", "cars", "flowers", "food101"),
  *("sun397", "dtd", "fgvc_aircraft", "pets", "eurosat", "imagenet1k"),
)
# Set -> further names of its folder.
CAPTIONED = {
  "mscoco_captions": ("mscoco", "coco"),
  "flickr30k": ("flickr",),
  "mscoco_val2014": ("coco2014",),  # not `coco`, where Karpathy's splits lie, which hold part of val2014 alone
}
PREFERRED = ("test", "val", "validation")  # splits of a prepared set
NAMES = (*LABELLED, *CAPTIONED)


def folders(set_name: str) -> list[str]:
  """Return names that the set's folder may have under the root, in the order in which they are looked for."""
  if set_name == "mscoco_val2014":
    return [set_name, *CAPTIONED[set_name]]
  own = [set_name, *CAPTIONED.get(set_name, ())]
  # VTAB's copies first: they are of a test split where the set itself has none.
  return [*own, *(f"wds_vtab-{name}" for name in own if set_name in LABELLED), *(f"wds_{name}" for name in own)]


def _find(root: pathlib.Path, set_name: str) -> pathlib.Path | None:
  """Return the folder of the set; None where it is not there."""
  there = (root / name for name in folders(set_name))
  marks = (wds_folder.MARK, records.INFO)
  return next((folder for folder in there if any((folder / mark).is_file() for mark in marks)), None)


def is_there(root: pathlib.Path, set_name: str) -> bool:
  """Say whether a set of this name is found under the root."""
  return _find(root, set_name) is not None


def open_set(root: pathlib.Path, set_name: str) -> Labelled | Captioned:
  """Open the set under the root, with labels as places in the set's class list.

  Raises:
    UserError: it is not there, is damaged, or has classes that are not the set's.
  """
  folder = _find(root, set_name)
  if folder is None:
    how = f"torchvision {set_name}" if set_name in LABELLED else "flickr30k" if set_name == "flickr30k" else "coco"
    raise UserError(
      f"no {set_name} in {root}; it was looked for in its folders {', '.join(folders(set_name))}; write one by diffdis"
      f" prepare_data {how} --source=DIR --out={root / set_name}"
    )
  is_wds = (folder / wds_folder.MARK).is_file()
  if set_name in CAPTIONED:
    return wds_folder.read_captions(folder) if is_wds else _read_captions(folder)
  known = class_lists.load()[set_name]
  return wds_folder.read(folder, known) if is_wds else _read(folder, known)


def _read(path: pathlib.Path, known: ClassList) -> Labelled:
  """Read images and labels, which are those of the field `class`, of a prepared set. Raises UserError: no such records,
  or other classes."""
  split = _split(path)
  pairs = records.open_pairs(path, split=split, num_images=None)
  names = [record.get("class") for record in _without_images(pairs, path)]
  if not all(isinstance(name, str) for name in names):
    raise UserError(f"{path} has records without `class`; write it by prepare_data torchvision {known.set_name}")
  classes, labels = np.unique(np.array(names, np.str_), return_inverse=True)
  places = class_lists.match(classes.tolist(), known, where=str(path))
  # What prepare_data calls `train` has no splits.
  origin = Origin("prepared", str(path), "all" if split == "train" else split)
  return Labelled(_images(pairs), places[labels], known.classnames, origin)


def _read_captions(path: pathlib.Path) -> Captioned:
  """Read images and all of their captions of a prepared set."""
  split = _split(path)
  pairs = records.open_pairs(path, split=split, num_images=None)
  captions = [tuple(records.captions_of(record)) or (record["caption"],) for record in _without_images(pairs, path)]
  return Captioned(_images(pairs), captions, Origin("prepared", str(path), split))


def _images(pairs: Any) -> Lazy:
  return Lazy(pairs, operator.itemgetter("image"))


def _split(path: pathlib.Path) -> str:
  """Choose the split that is measured. Raises UserError: there is none."""
  splits = records.read_info(path).splits
  if [*splits] == ["train"]:  # as prepare_data calls what has no splits
    return "train"
  if measured := [name for name in PREFERRED if name in splits]:
    return measured[0]
  raise UserError(f"{path} has the splits {', '.join(sorted(splits))}, none of {', '.join(PREFERRED)}")


def _without_images(pairs: Any, path: pathlib.Path) -> list[dict[str, Any]]:
  """Read all records, without their images. Raises UserError: one is damaged; a figure is of all or of none."""
  fields = []
  for index in range(len(pairs)):
    try:
      record = pairs[index]
    except records.Unusable as error:
      raise UserError(f"{path}: record {index} cannot be used: {error}; copy it again, or prepare it again") from error
    fields.append({name: value for name, value in record.items() if name != "image"})
  return fields
