"""MSCOCO captions and Flickr30k, from the files as their authors publish them: several captions an image.

A record's caption is the first one; all of them are its field `captions`, of which training samples one each time.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.builder import CaptionedImages
from diffdis_jax.data.prepare.parts import Item, Part
from diffdis_jax.errors import UserError

KARPATHY_CITATION = (
  "@inproceedings{karpathy2015deep, title = {Deep Visual-Semantic Alignments for Generating Image Descriptions}, "
  "author = {Karpathy, Andrej and Fei-Fei, Li}, booktitle = {CVPR}, year = {2015}}"
)
COCO_FILE = re.compile(r"captions_([a-z]+)(\d{4})\.json")


class Coco(CaptionedImages):
  """MSCOCO captions, five an image."""

  name = "coco"
  DESCRIPTION = (
    "MSCOCO: photographs of everyday scenes, five captions each, by the splits of the files it is made from."
  )
  CITATION = (
    "@article{chen2015microsoft, title = {Microsoft COCO Captions: Data Collection and Evaluation Server}, author = "
    "{Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and Dollar, Piotr and "
    "Zitnick, C. Lawrence}, journal = {arXiv:1504.00325}, year = {2015}}\n" + KARPATHY_CITATION
  )
  HOMEPAGE = "https://cocodataset.org"


class Flickr30k(CaptionedImages):
  """Flickr30k with Karpathy's splits, five captions an image."""

  name = "flickr30k"
  DESCRIPTION = "Flickr30k: photographs of people and animals, five captions each, in Karpathy's splits."
  CITATION = (
    "@article{young2014image, title = {From image descriptions to visual denotations}, author = {Young, Peter and Lai, "
    "Alice and Hodosh, Micah and Hockenmaier, Julia}, journal = {TACL}, year = {2014}}\n" + KARPATHY_CITATION
  )
  HOMEPAGE = "https://shannon.cs.illinois.edu/DenotationGraph"


def find_flickr30k(source: pathlib.Path) -> list[Part]:
  """Find the parts of a folder with Karpathy's `dataset_flickr30k.json` and the images, in it or in `flickr30k-images`.

  Raises:
    UserError: no such file, or one of another form.
  """
  parts.check_folder(source, "a folder with dataset_flickr30k.json and the images")
  table = source / "dataset_flickr30k.json"
  if not table.exists():
    raise UserError(f"no {table}; it comes with Karpathy's splits (caption_datasets.zip)")
  images = [source / name for name in ("flickr30k-images", "flickr30k_images", "images", "Images")]
  return _karpathy(table, next((folder for folder in images if folder.is_dir()), source))


def find_coco(source: pathlib.Path) -> list[Part]:
  """Find the parts of a folder with `annotations/captions_train2017.json` and the images in `train2017`, and the like.

  A file `dataset_coco.json` in it, Karpathy's, takes precedence; its `restval` is part of `train`.

  Raises:
    UserError: no such files, or files of another form.
  """
  parts.check_folder(source, "a folder with annotations/captions_train2017.json and train2017/, or dataset_coco.json")
  images = source / "images" if (source / "images").is_dir() else source
  # Karpathy's splits first, by which retrieval is measured; the annotations of both years may lie beside them.
  if (source / "dataset_coco.json").exists():
    return _karpathy(source / "dataset_coco.json", images)
  found: list[Part] = []
  for table in sorted([*source.glob("captions_*.json"), *source.glob("annotations/captions_*.json")]):
    if match := COCO_FILE.fullmatch(table.name):
      # 2014 and 2017 part the same images differently, so that one's training images are the other's validation.
      if any(part.split == match[1] for part in found):
        raise UserError(f"{source} has two files of split {match[1]}; keep those of one year")
      found += parts.files(_coco_items(table, f"{match[1]}{match[2]}"), split=match[1], root=images)
  if not found:
    raise UserError(f"no annotations/captions_train2017.json and no dataset_coco.json in {source}")
  return found


def _karpathy(table: pathlib.Path, root: pathlib.Path) -> list[Part]:
  by_split: dict[str, list[Item]] = collections.defaultdict(list)
  try:
    for image in parts.read_json(table)["images"]:
      # As the field trains on: `restval` is what of val2014 Karpathy left for training.
      split = "train" if image["split"] == "restval" else image["split"]
      if not isinstance(split, str):
        raise TypeError(f"split {split!r}")
      file = "/".join(filter(None, (image.get("filepath"), image["filename"])))
      captions = [sentence["raw"].strip() for sentence in image["sentences"]]
      by_split[split].append(_item(file, captions, image.get("imgid")))
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{table} is not of the form of Karpathy's splits: {error!r}") from error
  return [part for split, items in sorted(by_split.items()) for part in parts.files(items, split=split, root=root)]


def _coco_items(table: pathlib.Path, folder: str) -> Iterator[Item]:
  try:
    content: Any = parts.read_json(table)
    captions = collections.defaultdict(list)
    for annotation in content["annotations"]:
      captions[annotation["image_id"]].append(annotation["caption"].strip())
    for image in sorted(content["images"], key=lambda image: image["id"]):
      yield _item(f"{folder}/{image['file_name']}", captions[image["id"]], image["id"])
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{table} is not of the form of COCO's captions: {error!r}") from error


def _item(file: str, captions: list[str], number: Any) -> Item:
  # An image whose captions are all empty becomes a pair without one, which the preparation counts.
  captions = [caption for caption in captions if caption]
  metadata = json.dumps({"captions": captions, "image_id": number}, ensure_ascii=False)
  return Item(file, captions[0] if captions else "", metadata)
