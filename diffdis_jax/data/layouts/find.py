"""Find a set under a folder of data sets: what prepare_data wrote, or CLIP_benchmark's tars."""

from __future__ import annotations

import operator
import pathlib

import numpy as np

from diffdis_jax.data import records
from diffdis_jax.data.layouts import class_lists, wds_folder
from diffdis_jax.data.layouts.class_lists import ClassList
from diffdis_jax.data.layouts.labelled import Captioned, Labelled, Origin, Published
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
MARKS = (wds_folder.MARK, records.INFO)  # files by which the folder of a set is known


def folders(set_name: str) -> list[str]:
  """Return names that the set's folder may have under the root, in the order in which they are looked for."""
  own = [set_name, *CAPTIONED.get(set_name, ())]
  # VTAB's copies first: they are of a test split where the set itself has none. MSCOCO's val2014 is not published so.
  prefixes = () if set_name == "mscoco_val2014" else ("wds_vtab-", "wds_") if set_name in LABELLED else ("wds_",)
  return [*own, *(f"{prefix}{name}" for prefix in prefixes for name in own)]


def folder_of(root: pathlib.Path, set_name: str) -> pathlib.Path | None:
  """Return the folder of the set under the root; None where it is not there."""
  there = (root / name for name in folders(set_name))
  return next((folder for folder in there if any((folder / mark).is_file() for mark in MARKS)), None)


def open_set(root: pathlib.Path, set_name: str) -> Published:
  """Open the set under the root, with labels as places in the set's class list. Raises UserError: it is not there, is
  damaged, or has classes that are not the set's."""
  folder = folder_of(root, set_name)
  if folder is None:
    how = f"torchvision {set_name}" if set_name in LABELLED else "flickr30k" if set_name == "flickr30k" else "coco"
    raise UserError(
      f"no {set_name} in {root}; it was looked for in its folders {', '.join(folders(set_name))}; write one by diffdis"
      f" prepare_data {how} --source=DIR --out={root / set_name}"
    )
  known = None if set_name in CAPTIONED else class_lists.load()[set_name]
  if (folder / wds_folder.MARK).is_file():
    return wds_folder.read(folder, known)
  return _read_prepared(folder, known)


def _read_prepared(path: pathlib.Path, known: ClassList | None) -> Published:
  """Read what prepare_data wrote: images with all of their captions, or for a list of classes with their labels, which
  are those of the field `class`. Raises UserError: no such records, a damaged one, or other classes."""
  splits = records.read_info(path).splits
  # What prepare_data calls `train` alone has no splits.
  split = "train" if [*splits] == ["train"] else next((name for name in PREFERRED if name in splits), None)
  if split is None:
    raise UserError(f"{path} has the splits {', '.join(sorted(splits))}, none of {', '.join(PREFERRED)}")
  pairs = records.open_pairs(path, split=split, num_images=None)
  captions, names, read = [], [], operator.itemgetter("image")
  for index in range(len(pairs)):
    try:
      record = pairs[index]
    except records.Unusable as error:  # a figure is of all records or of none
      raise UserError(f"{path}: record {index} cannot be used: {error}; copy it again, or prepare it again") from error
    captions.append(tuple(records.captions_of(record)) or (record["caption"],))
    names.append(record.get("class"))
  if known is None:
    return Captioned(pairs, captions, read=read, origin=Origin("prepared", str(path), split))
  if not all(isinstance(name, str) for name in names):
    raise UserError(f"{path} has records without `class`; write it by prepare_data torchvision {known.set_name}")
  classes, labels = np.unique(np.array(names, np.str_), return_inverse=True)
  places = class_lists.match(classes.tolist(), known, where=str(path))
  origin = Origin("prepared", str(path), "all" if split == "train" else split)
  return Labelled(pairs, places[labels], known.classnames, read=read, origin=origin)
