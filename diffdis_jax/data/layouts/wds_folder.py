"""CLIP_benchmark's folders of webdataset tars, as published under clip-benchmark/wds_NAME.

classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt
test/nshards.txt, test/0.tar, test/1.tar, ...: s0000000.webp (or .png, .jpg), s0000000.cls (or .txt), ...
"""

from __future__ import annotations

import operator
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from diffdis_jax.data import tars
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.data.layouts.class_lists import ClassList
from diffdis_jax.data.layouts.labelled import Captioned, Labelled, Lazy, Origin
from diffdis_jax.data.records import MOST_BYTES, MOST_TEXT_BYTES, Unusable
from diffdis_jax.errors import UserError

SPLIT = "test"
MARK = f"{SPLIT}/nshards.txt"  # the file by which such a folder is known
_NUMBER = re.compile(r"\d{1,18}")  # of some thousands of digits Python makes no number
Sample = dict[str, tars.Member]  # of one key: ending -> its file, images as `image`


def read(path: pathlib.Path, known: ClassList) -> Labelled:
  """Read images and labels of the split `test`, in the order of the tars.

  Raises:
    UserError: it is no classification set, has no class names or other ones, lacks a tar, or holds a label that is no
      number or that no class has.
  """
  if (kind := _kind(path)) != "classification":
    raise UserError(f"{path} is of type {kind} (dataset_type.txt), not of images with one label each")
  classes = _lines(path / "classnames.txt")
  if not classes:
    raise UserError(f"no {path / 'classnames.txt'}; labels go by name, and their numbers alone do not say which")
  # Labels now, images when they are asked for: a set's labels are small files beside each image.
  samples = list(_samples(path, "cls"))
  labels = np.array([_label(sample["cls"], len(classes)) for sample in samples], np.int64)
  places = class_lists.match(classes, known, where=str(path))
  origin = Origin("wds", str(path), SPLIT, tuple(_lines(path / "zeroshot_classification_templates.txt")))
  return Labelled(_images(samples), places[labels], known.classnames, origin)


def read_captions(path: pathlib.Path) -> Captioned:
  """Read images and their captions, one a line. Raises UserError: it is no retrieval set, or lacks a tar."""
  if (kind := _kind(path)) != "retrieval":
    raise UserError(f"{path} is of type {kind} (dataset_type.txt), not of images with captions")
  samples = list(_samples(path, "txt"))
  lines = (_text(_bytes(sample["txt"]), path).splitlines() for sample in samples)
  captions = [tuple(filter(None, map(str.strip, texts))) for texts in lines]
  if empty := [number for number, texts in enumerate(captions) if not texts]:
    raise UserError(f"{path}: image {empty[0]} has no caption")
  return Captioned(_images(samples), captions, Origin("wds", str(path), SPLIT))


def _kind(path: pathlib.Path) -> str:
  # A folder of classification may lack the file.
  return (_lines(path / "dataset_type.txt") or ["classification"])[0].lower()


def _lines(path: pathlib.Path) -> list[str]:
  """Read the lines of a text file; none where there is no file."""
  return [line.strip() for line in _text(path.read_bytes(), path).splitlines()] if path.is_file() else []


def _text(content: bytes, path: pathlib.Path) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{path} holds text that is not UTF-8 ({error}); download it again") from error


def _samples(path: pathlib.Path, field: str) -> Iterator[Sample]:
  """Yield the samples of all tars. Raises UserError: one is missing or damaged, has a file twice, or a sample lacks its
  image or the field."""
  shards = path / MARK
  count = _text(shards.read_bytes(), shards).strip()
  if not _NUMBER.fullmatch(count) or not int(count):
    raise UserError(f"{shards} says {count!r:.100}; it should be the number of tars")
  # By their number, not by what lies there: a tar that was not downloaded must be missed.
  for shard in range(int(count)):
    tar = path / SPLIT / f"{shard}.tar"
    if not tar.is_file():
      raise UserError(f"no {tar}, one of {count} by nshards.txt; download it")
    index = tars.index(tar, _field_of)
    # Cut off, it would be a smaller set, whose figures look like any other's.
    if not index.whole:
      raise UserError(f"{tar} is damaged or cut off; download it again")
    for key, sample in index.samples.items():
      if lacking := {"image", field} - {*sample}:
        raise UserError(f"{tar}: {key} has no {min(lacking)}; download it again")
      yield sample


def _field_of(ending: str) -> str:
  return "image" if ending in tars.IMAGE_ENDINGS else ending


def _label(member: tars.Member, classes: int) -> int:
  text = _bytes(member).decode(errors="replace").strip()
  if not _NUMBER.fullmatch(text) or int(text) >= classes:
    raise UserError(f"{member.path} has the label {text!r:.100}; there are {classes} classes, counted from 0")
  return int(text)


def _bytes(member: tars.Member) -> bytes:
  try:
    return member.read(MOST_TEXT_BYTES)
  except Unusable as error:
    raise UserError(f"{member.path} holds a text that cannot be read: {error}; download it again") from error


def _images(samples: Sequence[Sample]) -> Lazy:
  # Not by a lambda, which no pickle takes.
  return Lazy([sample["image"] for sample in samples], operator.methodcaller("read", MOST_BYTES))
