"""Folders that prepare_data wrote are measured on."""

from __future__ import annotations

import pathlib

import pytest

from diffdis_jax.data import sources
from diffdis_jax.data.layouts import class_lists, find
from diffdis_jax.data.prepare import own, parts, write
from diffdis_jax.errors import UserError
from tests.raw_pairs import picture


def read(root, name):
  return sources.open_source(name=name, path=root, image_size=8)


def write_classes(root: pathlib.Path, name: str, classes, split: str = "test") -> pathlib.Path:
  """Prepare a set of one picture a class, whose seed is its place."""
  for place, name_of_class in enumerate(classes):
    (root / "raw" / split / name_of_class).mkdir(parents=True)
    (root / "raw" / split / name_of_class / "a.png").write_bytes(picture(place))
  write.prepare(own.classes(root / "raw"), root / name, data_set=own.CLASSES)
  return root / name


def test_class_folders_that_prepare_data_wrote(tmp_path):
  numbers = class_lists.load()["imagenet1k"].names_in_data
  write_classes(tmp_path, "imagenet1k", (numbers[0], numbers[1], numbers[999]), "val")
  source = read(tmp_path, "imagenet1k")
  assert source.labels.tolist() == [0, 1, 999] and source.origin.layout == "prepared" and source.origin.split == "val"
  assert source[2]["image"] == picture(2) and source[0]["class"] == "tench"
  assert find.folder_of(tmp_path, "imagenet1k") and not find.folder_of(tmp_path / "raw", "cifar10")


def test_other_classes_are_refused(tmp_path):
  write_classes(tmp_path, "cifar10", ("cat", "lynx"))
  with pytest.raises(UserError, match="class 1 is 'lynx', which is none of the 10 classes of cifar10"):
    read(tmp_path, "cifar10")


def test_captions_that_prepare_data_wrote(tmp_path):
  texts = [["a cat", "the cat"], ["a dog"]]
  items = []
  for i, captions in enumerate(texts):
    (tmp_path / f"{i}.png").write_bytes(picture(i))
    items.append(parts.file_pair(f"{i}.png", captions[0], captions=captions))
  of_splits = [part for split in ("test", "train") for part in parts.files(items, split=split, root=tmp_path)]
  write.prepare(of_splits, tmp_path / "coco")
  source = read(tmp_path, "mscoco_captions")
  assert [source[i]["captions"] for i in range(2)] == texts and source.origin.split == "test"
  assert source[1]["image"] == picture(1) and source.origin.layout == "prepared"
  assert not find.folder_of(tmp_path, "mscoco_val2014")  # a split of Karpathy's is not the whole of it
  (tmp_path / "coco").rename(tmp_path / "coco2014")
  assert find.folder_of(tmp_path, "mscoco_val2014") and not find.folder_of(tmp_path, "mscoco_captions")


def damage(folder: pathlib.Path, image: bytes) -> None:
  """Damage the record that has this image."""
  (shard,) = folder.glob("*.array_record*")
  content = bytearray(shard.read_bytes())
  place = content.index(image)
  content[place : place + len(image)] = bytes(len(image))
  shard.write_bytes(content)


def test_a_damaged_record_is_one_line(tmp_path):
  """A figure is of all records or of none."""
  message = "record {} cannot be used: unreadable record; copy it again, or prepare it again"
  damage(write_classes(tmp_path, "dtd", ("banded", "blotchy")), picture(1))
  with pytest.raises(UserError, match=f"dtd: {message.format(1)}"):
    read(tmp_path, "dtd")
  items = [parts.file_pair(f"raw/test/{name}/a.png", "a caption") for name in ("banded", "blotchy")]
  write.prepare(parts.files(items, split="test", root=tmp_path), tmp_path / "coco")
  damage(tmp_path / "coco", picture(0))
  with pytest.raises(UserError, match=f"coco: {message.format(0)}"):
    read(tmp_path, "mscoco_captions")
