"""The twelve zero-shot sets, from the folders that their authors publish and torchvision's classes read.

Images that lie as files keep their bytes. Those of CIFAR and of Pets, which torchvision gives as pixels, become PNG.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from diffdis_jax.data import image_files
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.parts import FilesPart, Part, RawPair
from diffdis_jax.data.prepare.write import DataSet
from diffdis_jax.errors import UserError, not_installed

ZERO_SHOT = DataSet(
  "zero_shot_set",
  "The images of a published zero-shot set. The caption is the class's name as OpenAI's prompts have it; label, its"
  " number there, and class, its name in the data, are fields of a record.",
)


class _Set(NamedTuple):
  """A set as torchvision takes it: its split here, `train` where it has none, and the data set of a root.

  With `loader=str` an image is the path of its file.
  """

  split: str
  open: Callable[[Any, pathlib.Path], Any]


# Caltech-101 with its folder of background, as CLIP_benchmark has it, and ImageNet without the archive of its names.
SETS = {
  "cifar10": _Set("test", lambda sets, root: sets.CIFAR10(root, train=False)),
  "cifar100": _Set("test", lambda sets, root: sets.CIFAR100(root, train=False)),
  "caltech101": _Set("train", lambda sets, at: sets.ImageFolder(at / "caltech101/101_ObjectCategories", loader=str)),
  "cars": _Set("test", lambda sets, root: sets.StanfordCars(root, split="test", loader=str)),
  "flowers": _Set("test", lambda sets, root: sets.Flowers102(root, split="test", loader=str)),
  "food101": _Set("test", lambda sets, root: sets.Food101(root, split="test", loader=str)),
  "sun397": _Set("train", lambda sets, root: sets.SUN397(root, loader=str)),
  "dtd": _Set("test", lambda sets, root: sets.DTD(root, split="test", loader=str)),
  "fgvc_aircraft": _Set("test", lambda sets, root: sets.FGVCAircraft(root, split="test", loader=str)),
  "pets": _Set("test", lambda sets, root: sets.OxfordIIITPet(root, split="test")),
  "eurosat": _Set("train", lambda sets, root: sets.EuroSAT(root, loader=str)),
  "imagenet1k": _Set("val", lambda sets, root: sets.ImageFolder(root / "val", loader=str)),
}
PIXELS = ("cifar10", "cifar100", "pets")


@dataclasses.dataclass
class PixelsPart(FilesPart):
  """Some of the images of a set that torchvision gives as pixels; `row` is the number of one."""

  set_name: str

  def __iter__(self) -> Iterator[RawPair]:
    images = _open(self.set_name, self.root)
    for pair in self.pairs:
      yield dataclasses.replace(pair, image=image_files.png(images[pair.row][0]))


def find_parts(set_name: str, source: pathlib.Path) -> list[Part]:
  """Find the parts of the set of this name under `source`, which torchvision's class takes as its root. Raises
  UserError: no such folder or set, or classes that are not the set's."""
  parts.check_folder(source, f"the folder that torchvision takes as root of {set_name}")
  split, images = SETS[set_name].split, _open(set_name, source)
  known = class_lists.load()[set_name]
  places = class_lists.match(images.classes, known, where=f"{set_name} in --source={source}").tolist()
  # `class` is the data's own name: evaluations look it up as one of the published set.
  names = known.names_in_data or known.classnames
  part, pairs = functools.partial(PixelsPart, set_name=set_name) if set_name in PIXELS else FilesPart, []
  for number in range(len(images)):
    image, label = images[number]
    file = "" if set_name in PIXELS else os.path.relpath(image, source)
    place = places[label]
    pair = parts.file_pair(file, known.classnames[place], **{"label": place, "class": names[place]})
    pairs.append(dataclasses.replace(pair, key=file or f"{number:08d}", row=number))
  if set_name == "sun397":  # whose files torchvision takes in whatever order the disk gives
    pairs.sort(key=lambda pair: pair.file)
  return parts.files(pairs, split=split, root=source, part=part)


@functools.lru_cache(maxsize=1)  # by each process, for all of its parts
def _open(set_name: str, root: pathlib.Path) -> Any:
  try:
    from torchvision import datasets  # here, since it takes seconds
  except ImportError as error:
    raise not_installed("prepare_data torchvision", "torchvision", "torch") from error
  try:
    return SETS[set_name].open(datasets, root)
  except Exception as error:  # whatever a file of another form leads torchvision into
    raise UserError(f"torchvision cannot read {set_name} in --source={root}: {error!r:.300}") from error
