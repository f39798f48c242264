"""Published sets of captioned images, from the files as their authors publish them: CC3M, MSCOCO, Flickr30k.

A record's caption is the first one of an image; where there are several, all of them are its field `captions`, of
which training samples one each time.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.common.files import read_json
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.parts import SPLITS, Part, RawPair
from diffdis_jax.data.prepare.write import DataSet
from diffdis_jax.errors import UserError

SHORT_SIDE = 288  # pixels, of CC3M: squares of 256 px are still made smaller, never larger
_COCO_FILE = re.compile(r"captions_([a-z]+)(\d{4})\.json")
CC3M = DataSet(
  "cc3m",
  "Conceptual Captions: images from the web with their alternative texts, cleaned; about 3.3 million pairs when "
  "published, of which 2,905,954 for training were still to be had in img2dataset's layout.",
  "https://ai.google.com/research/ConceptualCaptions",
)
COCO = DataSet(
  "coco",
  "MSCOCO: photographs of everyday scenes, five captions each, by the splits of the files it is made from.",
  "https://cocodataset.org",
)
FLICKR30K = DataSet(
  "flickr30k",
  "Flickr30k: photographs of people and animals, five captions each, in Karpathy's splits.",
  "https://shannon.cs.illinois.edu/DenotationGraph",
)


def find_cc3m(source: pathlib.Path) -> list[Part]:
  """Find the tars of the folder. Those of `validation` are of split `val`."""
  tars = parts.tars(source)
  for part in tars:
    part.split = SPLITS.get(part.split, part.split)
  return tars


def find_flickr30k(source: pathlib.Path) -> list[Part]:
  """Find the parts of a folder with Karpathy's `dataset_flickr30k.json` and the images, in it or in `flickr30k-images`.
  Raises UserError: no such file, or one of another form."""
  parts.check_folder(source, "a folder with dataset_flickr30k.json and the images")
  table = source / "dataset_flickr30k.json"
  if not table.exists():
    raise UserError(f"no {table}; it comes with Karpathy's splits (caption_datasets.zip)")
  images = [source / name for name in ("flickr30k-images", "flickr30k_images", "images", "Images")]
  return _karpathy(table, next((folder for folder in images if folder.is_dir()), source))


def find_coco(source: pathlib.Path) -> list[Part]:
  """Find the parts of a folder with `annotations/captions_train2017.json` and the images in `train2017`, and the like.
  Karpathy's `dataset_coco.json` in it takes precedence. Raises UserError: no such files, or files of another form."""
  parts.check_folder(source, "a folder with annotations/captions_train2017.json and train2017/, or dataset_coco.json")
  images = source / "images" if (source / "images").is_dir() else source
  # Karpathy's splits first, by which retrieval is measured; the annotations of both years may lie beside them.
  if (source / "dataset_coco.json").exists():
    return _karpathy(source / "dataset_coco.json", images)
  by_split: dict[str, list[RawPair]] = {}
  for table in sorted([*source.glob("captions_*.json"), *source.glob("annotations/captions_*.json")]):
    if match := _COCO_FILE.fullmatch(table.name):
      # 2014 and 2017 part the same images differently, so that one's training images are the other's validation.
      if match[1] in by_split:
        raise UserError(f"{source} has two files of split {match[1]}; keep those of one year")
      by_split[match[1]] = _coco_pairs(table, f"{match[1]}{match[2]}")
  if not by_split:
    raise UserError(f"no annotations/captions_train2017.json and no dataset_coco.json in {source}")
  return _cut(by_split, images)


def _cut(by_split: Mapping[str, Sequence[RawPair]], root: pathlib.Path) -> list[Part]:
  return [part for split, pairs in by_split.items() for part in parts.files(pairs, split=split, root=root)]


def _karpathy(table: pathlib.Path, root: pathlib.Path) -> list[Part]:
  by_split: dict[str, list[RawPair]] = collections.defaultdict(list)
  try:
    for image in read_json(table)["images"]:
      # As the field trains on: `restval` is what of val2014 Karpathy left for training.
      split = "train" if image["split"] == "restval" else image["split"]
      if not isinstance(split, str):
        raise TypeError(f"split {split!r}")
      file = "/".join(filter(None, (image.get("filepath"), image["filename"])))
      by_split[split].append(_pair(file, [sentence["raw"] for sentence in image["sentences"]], image.get("imgid")))
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{table} is not of the form of Karpathy's splits: {error!r}") from error
  return _cut(dict(sorted(by_split.items())), root)


def _coco_pairs(table: pathlib.Path, folder: str) -> list[RawPair]:
  try:
    content: Any = read_json(table)
    captions = collections.defaultdict(list)
    for annotation in content["annotations"]:
      captions[annotation["image_id"]].append(annotation["caption"])
    images = sorted(content["images"], key=lambda image: image["id"])
    return [_pair(f"{folder}/{image['file_name']}", captions[image["id"]], image["id"]) for image in images]
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{table} is not of the form of COCO's captions: {error!r}") from error


def _pair(file: str, captions: list[str], number: Any) -> RawPair:
  # An image whose captions are all empty becomes a pair without one, which the preparation counts.
  captions = [caption.strip() for caption in captions if caption.strip()]
  return parts.file_pair(file, captions[0] if captions else "", captions=captions, image_id=number)
