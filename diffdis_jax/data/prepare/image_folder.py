"""Images in a folder for each class, as torchvision's ImageFolder and many published sets have them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator

from diffdis_jax.data import image_files, paths
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.builder import CaptionedImages
from diffdis_jax.data.prepare.parts import Item, Part
from diffdis_jax.errors import UserError

SPLITS = {"train", "val", "valid", "validation", "test"}
CALLED = {"validation": "val", "valid": "val"}  # what some of them are called in a data set


class ImageFolder(CaptionedImages):
  """Images in class folders."""

  name = "folder"
  DESCRIPTION = "Images in class folders. The caption is the class's name; label and class are fields of a record."


def find_parts(source: pathlib.Path) -> list[Part]:
  """Find the parts of CLASS/IMAGE, or of SPLIT/CLASS/IMAGE with splits of the usual names. Classes are numbered by
  `in_order` over all splits. A record has the number as `label` and the folder's name as `class`.

  Raises:
    UserError: no folder, or none of images in it; splits mixed with classes, in one of them, or twice.
  """
  parts.check_folder(source, "a folder of class folders")
  children = sorted(_folders(source))
  named = {path.name.lower(): path for path in children if path.name.lower() in SPLITS}
  splits = {CALLED.get(name, name): path for name, path in named.items()}
  # A class may be called `test`: only where all folders are splits are they taken for such.
  if named and len(named) < len(children):
    raise UserError(
      f"{source} mixes splits and classes: {', '.join(path.name for path in children[:10])}; if all are classes, move"
      " them into one new folder, train"
    )
  if len(splits) < len(named):
    same = [path.name for name, path in named.items() if CALLED.get(name, name) == "val"]
    raise UserError(f"{source} has {' and '.join(same)}, each of which would be split val; leave one of them")
  roots = splits or {"train": source}
  # Over all splits, so that a class which one of them lacks moves no other's number.
  classes = in_order({path.name for root in roots.values() for path in _folders(root)})
  # Of --source one folder too high each data set would be a class, its test images among them.
  for path in (path for root in roots.values() for path in _folders(root)):
    inside = sorted(each.name for each in _folders(path) if each.name.lower() in SPLITS)
    if len(inside) > 1:
      raise UserError(f"{path} has the folders {', '.join(inside)}; if they are splits, give it as --source")
  found: list[Part] = []
  for split, root in roots.items():
    items = []
    for label, name in enumerate(classes):
      metadata = json.dumps({"label": label, "class": name}, ensure_ascii=False)
      there = parts.names_below(root / name) if (root / name).is_dir() else ()  # a split may lack a class
      images = sorted(path for path in (root / name / file for file in there) if _is_image(path))
      items += [Item(str(path.relative_to(source)), name.replace("_", " "), metadata) for path in images]
    found += parts.files(items, split=split, root=source)
  if not found:
    raise UserError(f"no images in class folders in {source}; it should hold CLASS/IMAGE.jpg or train/CLASS/IMAGE.jpg")
  return found


def _is_image(path: pathlib.Path) -> bool:
  return path.suffix[1:].lower() in image_files.ENDINGS


def _folders(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  return (path for path in folder.iterdir() if path.is_dir() and not paths.is_hidden(path.name))


def in_order(names: Iterable[str]) -> list[str]:
  """Class names in the order of their numbers: where all of them are whole numbers, by these; else by string.

  By string is what torchvision's ImageFolder does, which would put 10 before 2.
  """
  by_string = sorted(names)
  return sorted(by_string, key=int) if all(name.isdecimal() for name in by_string) else by_string
