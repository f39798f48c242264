"""COCO and Flickr30k in the files that CLIP_benchmark reads: captions by image, and the images beside them."""

from __future__ import annotations

import collections
import pathlib
from typing import Any

from diffdis_jax.common.files import read_json
from diffdis_jax.data.layouts.labelled import Captioned, Origin, image_files
from diffdis_jax.data.paths import is_below
from diffdis_jax.errors import UserError

ENDING = ".jpg"


def read_coco(table: pathlib.Path, images: pathlib.Path, *, split: str) -> Captioned:
  """Read COCO's annotation format, in the order of the images' numbers, with all captions of each image.

  Raises:
    UserError: the file is damaged or of another form, or an image has no caption.
  """
  captions = collections.defaultdict(list)
  try:
    content: Any = read_json(table)
    # Captions lie in the order in which they were written; the images' numbers give one that every copy has.
    for annotation in content["annotations"]:
      if text := annotation["caption"].strip():
        captions[annotation["image_id"]].append(text)
    # Some copies name the image with its folder in front.
    files = {image["id"]: images / pathlib.PurePosixPath(image["file_name"]).name for image in content["images"]}
    numbers = sorted(files)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{table} is not of the form of COCO's captions: {error!r}") from error
  if bare := [number for number in numbers if not captions[number]]:
    raise UserError(f"{table}: image {bare[0]} has no caption")
  paths, texts = [files[number] for number in numbers], [tuple(captions[number]) for number in numbers]
  return Captioned(image_files(paths), texts, Origin("files", str(table), split))


def flickr_images(folder: pathlib.Path) -> pathlib.Path:
  """Find the folder of Flickr30k's images. Copies give it different names, or have none."""
  folders = [folder / name for name in ("flickr30k-images", "flickr30k_images", "images", "Images")]
  return next((path for path in folders if path.is_dir()), folder)


def read_flickr(table: pathlib.Path, images: pathlib.Path, *, split: str) -> Captioned:
  """Read a file of a title line and lines IMAGE.jpg,CAPTION, in the order of each image's first line.

  Raises:
    UserError: a line of another form.
  """
  captions = collections.defaultdict(list)
  try:
    lines = table.read_text(encoding="utf-8").split("\n")[1:]
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {table}: {error}") from error
  for number, line in enumerate(lines, 2):
    if not line.strip():
      continue
    # At the ending, not the first comma: captions have commas, and file names may.
    name, sign, caption = line.strip().partition(f"{ENDING},")
    if not sign or not caption.strip():
      raise UserError(f"{table}, line {number}: {line.strip()[:40]!r} is not IMAGE{ENDING},CAPTION")
    captions[f"{name}{ENDING}"].append(caption.strip())
  if outside := next((name for name in captions if not is_below(images / name, images)), None):
    raise UserError(f"{table} names {outside}, which is not below {images}; download it again")
  texts = [tuple(found) for found in captions.values()]
  return Captioned(image_files([images / name for name in captions]), texts, Origin("files", str(table), split))
