"""Find a set under a folder of data sets, in whichever layout it lies."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import numpy as np

from diffdis_jax.data.layouts import class_lists, karpathy, tfds_folder, torchvision_folders, wds_folder
from diffdis_jax.data.layouts.labelled import Captioned, Labelled, Named
from diffdis_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Names:
  """The names of a set of labelled images.

  Attributes:
    tfds: in TensorFlow Datasets; the folder of a config, if any, lies below it.
    split: of TFDS to measure on, or a part of one.
    called: what that is for the set.
    others: more names of its folder.
  """

  tfds: str
  split: str = "test"
  called: str = "test"
  others: tuple[str, ...] = ()


# Of EuroSAT the last fifth is VTAB's test split. ImageNet's split `test` in TFDS has no labels.
LABELLED = {
  "cifar10": Names("cifar10"),
  "cifar100": Names("cifar100"),
  "caltech101": Names("caltech101"),
  "cars": Names("cars196", others=("stanford_cars",)),
  "flowers": Names("oxford_flowers102", others=("flowers102", "flowers-102")),
  "food101": Names("food101", "validation", others=("food-101",)),
  "sun397": Names("sun397", others=("SUN397",)),
  "dtd": Names("dtd"),
  "fgvc_aircraft": Names("fgvc_aircraft", others=("fgvc-aircraft-2013b",)),
  "pets": Names("oxford_iiit_pet", others=("oxford-iiit-pet",)),
  "eurosat": Names("eurosat", "train[80%:]"),
  "imagenet1k": Names("imagenet2012", "validation", "val", others=("imagenet",)),
}
CAPTIONED = {
  "mscoco_captions": ("mscoco", "coco"),
  "flickr30k": ("flickr",),
  "mscoco_val2014": ("coco2014", "mscoco", "coco", "mscoco_captions"),
}
OF_VAL2014 = ("mscoco_val2014", "coco2014")  # whose records are those of the whole of val2014, no split of Karpathy's
NAMES = (*LABELLED, *CAPTIONED)


def folders(set_name: str) -> list[str]:
  """Names that the set's folder may have under the root, in the order in which they are looked for."""
  if set_name in CAPTIONED:
    own = [set_name, *CAPTIONED[set_name]]
    return own if set_name == "mscoco_val2014" else [*own, *(f"wds_{name}" for name in own)]
  names = LABELLED[set_name]
  # Under the set's own name first: what somebody renamed to it is meant.
  own = [set_name, *dict.fromkeys(name for name in (names.tfds, *names.others) if name != set_name)]
  # VTAB's copies first: they are of a test split where the set itself has none.
  return [*own, *(f"wds_vtab-{name}" for name in own), *(f"wds_{name}" for name in own)]


def find_labelled(root: pathlib.Path, set_name: str) -> Callable[[], Named] | None:
  """Return the reader of the set, or None where the set is not there. Nothing is read yet."""
  names = LABELLED[set_name]
  for folder in (root / name for name in folders(set_name)):
    if wds_folder.is_one(folder):
      return functools.partial(wds_folder.read, folder)
    if stored := tfds_folder.find(folder):
      return functools.partial(tfds_folder.read, stored, split=names.split, called=names.called)
    if published := torchvision_folders.find(folder, set_name):
      return functools.partial(torchvision_folders.read, published, set_name)
  # At last the root itself as torchvision's, where a user has all sets side by side in their published folders.
  if published := torchvision_folders.find(root, set_name, below=False):
    return functools.partial(torchvision_folders.read, published, set_name)
  return None


def find_captioned(root: pathlib.Path, set_name: str) -> Callable[[], Captioned] | None:
  """Return the reader of the set, or None where the set is not there. Nothing is read yet."""
  for folder in (root / name for name in folders(set_name)):
    if found := _caption_files(folder, set_name):
      return found
    # The folders of Karpathy's splits hold part of val2014 alone.
    if set_name == "mscoco_val2014" and folder.name not in OF_VAL2014:
      continue
    if wds_folder.is_one(folder):
      return functools.partial(wds_folder.read_captions, folder)
    if stored := tfds_folder.find(folder):
      return functools.partial(tfds_folder.read_captions, stored)
  return None


def _caption_files(folder: pathlib.Path, set_name: str) -> Callable[[], Captioned] | None:
  if set_name == "flickr30k":
    table = folder / "flickr30k_test_karpathy.txt"
    images = karpathy.flickr_images(folder)
    return functools.partial(karpathy.read_flickr, table, images, split="test") if table.is_file() else None
  split = "test" if set_name == "mscoco_captions" else "val2014"
  name = "coco_test_karpathy.json" if split == "test" else "captions_val2014.json"
  tables = [path for path in (folder / name, folder / "annotations" / name) if path.is_file()]
  return functools.partial(karpathy.read_coco, tables[0], folder / "val2014", split=split) if tables else None


def _find(root: pathlib.Path, set_name: str) -> Callable[[], Named | Captioned] | None:
  return find_captioned(root, set_name) if set_name in CAPTIONED else find_labelled(root, set_name)


def is_there(root: pathlib.Path, set_name: str) -> bool:
  """Say whether a set of this name is found under the root."""
  return _find(root, set_name) is not None


def open_set(root: pathlib.Path, set_name: str) -> Labelled | Captioned:
  """The set under the root, labels as places in the set's class list.

  Raises:
    UserError: it is not there, is damaged, or has classes that are not the set's.
  """
  read = _find(root, set_name)
  if read is None:
    looked = f"its folders {', '.join(folders(set_name))}, in the layouts of docs/evaluation.md"
    raise UserError(f"no {set_name} in {root}; it was looked for in {looked}")
  found = read()
  if isinstance(found, Captioned):
    return found
  known = class_lists.load()[set_name]
  places = class_lists.match(found.classes, known, where=found.origin.path)
  return Labelled(found.images, np.asarray(places[found.labels]), known.classnames, found.origin)
