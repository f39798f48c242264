"""CLIP_benchmark's folders of webdataset tars, as published under clip-benchmark/wds_NAME.

classnames.txt, dataset_type.txt
test/nshards.txt, test/0.tar, test/1.tar, ...: s0000000.webp (or .png, .jpg), s0000000.cls (or .txt), ...
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffdis_jax.data import tars
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.data.layouts.class_lists import ClassList
from diffdis_jax.data.layouts.labelled import Captioned, Labelled, Origin, Published
from diffdis_jax.errors import UserError

SPLIT = "test"
MARK = f"{SPLIT}/nshards.txt"  # the file by which such a folder is known
_NUMBER = re.compile(r"\d{1,18}")  # of some thousands of digits Python makes no number
_FIELDS = {**dict.fromkeys(tars.IMAGE_ENDINGS, "image"), "cls": "cls", "txt": "txt"}


def read(path: pathlib.Path, known: ClassList | None) -> Published:
  """Read the images of the split `test`, in the order of the tars, with the labels of a class list, or without one with
  their captions, one a line. Raises UserError: it is a set of another kind, or damaged."""
  kind, what = ("retrieval", "captions") if known is None else ("classification", "one label each")
  # A folder of classification may lack the file.
  if (there := (_lines(path / "dataset_type.txt") or ["classification"])[0].lower()) != kind:
    raise UserError(f"{path} is of type {there} (dataset_type.txt), not of images with {what}")
  classes = [] if known is None else _lines(path / "classnames.txt")
  if known and not classes:
    raise UserError(f"no {path / 'classnames.txt'}; labels go by name, and their numbers alone do not say which")
  # Labels now, images when they are asked for: a set's labels are small files beside each image.
  samples = list(_samples(path, "txt" if known is None else "cls"))
  images = [sample["image"] for sample in samples]
  how: Any = dict(read=tars.Member.read, origin=Origin("wds", str(path), SPLIT))
  if known is None:
    captions = [tuple(_nonempty(sample["txt"].read(), path)) for sample in samples]
    if () in captions:
      raise UserError(f"{path}: image {captions.index(())} has no caption")
    return Captioned(images, captions, **how)
  labels = np.array([_label(sample["cls"], len(classes)) for sample in samples], np.int64)
  places = class_lists.match(classes, known, where=str(path))
  return Labelled(images, places[labels], known.classnames, **how)


def _lines(path: pathlib.Path) -> list[str]:
  """Read the lines of a text file that are not empty; none where there is no file."""
  return _nonempty(path.read_bytes(), path) if path.is_file() else []


def _nonempty(content: bytes, path: pathlib.Path) -> list[str]:
  try:
    return [*filter(None, map(str.strip, content.decode().splitlines()))]
  except UnicodeDecodeError as error:
    raise UserError(f"{path} holds text that is not UTF-8 ({error}); download it again") from error


def _samples(path: pathlib.Path, field: str) -> Iterator[dict[str, tars.Member]]:
  """Yield the files of each key of all tars. Raises UserError: a tar is missing or damaged, has a file twice, or a
  sample lacks its image or the field."""
  count = " ".join(_lines(path / MARK))
  if not _NUMBER.fullmatch(count) or not int(count):
    raise UserError(f"{path / MARK} says {count!r:.100}; it should be the number of tars")
  # By their number, not by what lies there: a tar that was not downloaded must be missed.
  for shard in range(int(count)):
    tar = path / SPLIT / f"{shard}.tar"
    if not tar.is_file():
      raise UserError(f"no {tar}, one of {count} by nshards.txt; download it")
    index = tars.index(tar, _FIELDS.get)
    # Cut off, it would be a smaller set, whose figures look like any other's.
    if not index.whole:
      raise UserError(f"{tar} is damaged or cut off; download it again")
    for key, sample in index.samples.items():
      if lacking := {"image", field} - {*sample}:
        raise UserError(f"{tar}: {key} has no {min(lacking)}; download it again")
      yield sample


def _label(member: tars.Member, classes: int) -> int:
  text = member.read().decode(errors="replace").strip()
  if not _NUMBER.fullmatch(text) or int(text) >= classes:
    raise UserError(f"{member.path} has the label {text!r:.100}; there are {classes} classes, counted from 0")
  return int(text)
