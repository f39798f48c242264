"""Find a set under a folder of data sets: what prepare_data wrote, or CLIP_benchmark's tars."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

from diffdis_jax.data.layouts import class_lists, tfds_folder, wds_folder
from diffdis_jax.data.layouts.labelled import Captioned, Labelled
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
NAMES = (*LABELLED, *CAPTIONED)


def folders(set_name: str) -> list[str]:
  """Return names that the set's folder may have under the root, in the order in which they are looked for."""
  if set_name == "mscoco_val2014":
    return [set_name, *CAPTIONED[set_name]]
  own = [set_name, *CAPTIONED.get(set_name, ())]
  # VTAB's copies first: they are of a test split where the set itself has none.
  return [*own, *(f"wds_vtab-{name}" for name in own if set_name in LABELLED), *(f"wds_{name}" for name in own)]


def _find(root: pathlib.Path, set_name: str) -> Callable[[], Labelled | Captioned] | None:
  """Return the reader of the set, or None where the set is not there. Nothing is read yet."""
  for folder in (root / name for name in folders(set_name)):
    for layout in (wds_folder, tfds_folder):
      if not (folder / layout.MARK).is_file():
        continue
      if set_name in CAPTIONED:
        return functools.partial(layout.read_captions, folder)
      return functools.partial(layout.read, folder, class_lists.load()[set_name])
  return None


def is_there(root: pathlib.Path, set_name: str) -> bool:
  """Say whether a set of this name is found under the root."""
  return _find(root, set_name) is not None


def open_set(root: pathlib.Path, set_name: str) -> Labelled | Captioned:
  """Open the set under the root, with labels as places in the set's class list.

  Raises:
    UserError: it is not there, is damaged, or has classes that are not the set's.
  """
  read = _find(root, set_name)
  if read is None:
    how = f"torchvision {set_name}" if set_name in LABELLED else "flickr30k" if set_name == "flickr30k" else "coco"
    raise UserError(
      f"no {set_name} in {root}; it was looked for in its folders {', '.join(folders(set_name))}; write one by diffdis"
      f" prepare_data {how} --source=DIR --out={root / set_name}"
    )
  return read()
