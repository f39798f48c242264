"""Folders of TensorFlow Datasets, and those that prepare_data wrote."""

from __future__ import annotations

import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffdis_jax.data import records, sources, transforms
from diffdis_jax.data.layouts import class_lists, find, tfds_folder
from diffdis_jax.data.prepare import builder, image_folder, parts
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from tests.raw_pairs import picture


def write(root, set_name, names, splits):
  """{split: labels} -> a folder NAME/VERSION, PNG inside."""

  class Fabricated(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # the names are those of TFDS
    name = set_name
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=names)}
      return tfds.core.DatasetInfo(
        builder=self, description="x", features=tfds.features.FeaturesDict(features), disable_shuffling=True
      )

    def _split_generators(self, manager):
      return {split: self._generate_examples(labels) for split, labels in splits.items()}

    def _generate_examples(self, labels):
      for i, label in enumerate(labels):
        yield i, {"image": io.BytesIO(picture(i)), "label": label}

  made = Fabricated(data_dir=str(root), file_format="array_record")
  made.download_and_prepare()
  return root / set_name / "1.0.0"


@pytest.fixture(autouse=True)
def quiet():
  tfds.disable_progress_bar()


def read(root, name):
  return sources.open_source(name=name, path=root, image_size=8)


def test_labels_go_by_the_names_in_the_data(tmp_path):
  """Caltech-101's order in TFDS is not that of the folders."""
  names = sorted(name.lower() for name in class_lists.load()["caltech101"].names_in_data)
  labels = [4, 0, 101, 37]
  folder = write(tmp_path, "caltech101", names, {"train": [0], "test": labels})
  source = read(tmp_path, "caltech101")
  assert [source[i]["class"] for i in range(4)] == ["background", "accordion", "yin and yang symbol", "off-center face"]
  assert source.labels[0] == 0 and source.origin.split == "test" and source.origin.path == str(folder)
  theirs = tfds.builder_from_directory(folder).as_data_source(split="test")
  for i, record in enumerate(theirs):
    np.testing.assert_array_equal(np.asarray(transforms.decode(source[i]["image"])), record["image"])
    assert names[record["label"]] == names[labels[i]]


def test_eurosats_test_split_is_vtabs_last_fifth(tmp_path):
  names = class_lists.load()["eurosat"].names_in_data
  write(tmp_path, "eurosat", names, {"train": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]})
  source = read(tmp_path, "eurosat")
  assert source.labels.tolist() == [8, 9] and source.origin.split == "test"
  np.testing.assert_array_equal(
    np.asarray(transforms.decode(source[1]["image"])), np.asarray(Image.open(io.BytesIO(picture(9))))
  )


def test_refused(tmp_path):
  write(tmp_path, "cifar10", ["cat", "lynx"], {"test": [0]})
  with pytest.raises(UserError, match="class 1 is 'lynx', which is none of the 10 classes of cifar10"):
    read(tmp_path, "cifar10")
  write(tmp_path, "food101", ["waffles"], {"train": [0]})
  with pytest.raises(UserError, match="has no split validation, only train"):
    read(tmp_path, "food101")
  info = write(tmp_path, "dtd", ["banded"], {"test": [0]}) / "dataset_info.json"
  info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
  with pytest.raises(UserError, match="whose records cannot be read by their number; write it again by tfds build"):
    read(tmp_path, "dtd")


def test_newest_version(tmp_path):
  for version in ("2.0.0", "10.0.0", "9.1.0"):
    (tmp_path / "config" / version).mkdir(parents=True)
    (tmp_path / "config" / version / "dataset_info.json").write_text("{}")
  assert tfds_folder.find(tmp_path) == tmp_path / "config/10.0.0" and tfds_folder.find(tmp_path / "x") is None


def test_class_folders_that_prepare_data_wrote(tmp_path):
  numbers = class_lists.load()["imagenet1k"].names_in_data
  for place in (999, 1, 0):
    (tmp_path / "raw/val" / numbers[place]).mkdir(parents=True)
    (tmp_path / "raw/val" / numbers[place] / "a.png").write_bytes(picture(place))
  settings = builder.Settings(num_processes=1)
  found = image_folder.find_parts(tmp_path / "raw")
  builder.prepare(found, tmp_path / "imagenet1k", builder=image_folder.ImageFolder, settings=settings)
  source = read(tmp_path, "imagenet1k")
  assert source.labels.tolist() == [0, 1, 999] and source.origin.layout == "prepared" and source.origin.split == "val"
  assert source[2]["image"] == picture(999) and source[0]["class"] == "tench"
  assert find.is_there(tmp_path, "imagenet1k") and not find.is_there(tmp_path / "raw", "cifar10")


def test_captions_that_prepare_data_wrote(tmp_path):
  texts = [["a cat", "the cat"], ["a dog"]]
  items = []
  for i, captions in enumerate(texts):
    (tmp_path / f"{i}.png").write_bytes(picture(i))
    items.append(parts.Item(f"{i}.png", captions[0], json.dumps({"captions": captions})))
  found = [part for split in ("test", "train") for part in parts.files(items, split=split, root=tmp_path)]
  builder.prepare(found, tmp_path / "coco", builder=builder.Pairs, settings=builder.Settings(num_processes=1))
  source = read(tmp_path, "mscoco_captions")
  assert [source[i]["captions"] for i in range(2)] == texts and source.origin.split == "test"
  assert source[1]["image"] == picture(1) and source.origin.layout == "prepared"
  assert not find.is_there(tmp_path, "mscoco_val2014")  # a split of Karpathy's is not the whole of it
  (tmp_path / "coco").rename(tmp_path / "coco2014")
  assert find.is_there(tmp_path, "mscoco_val2014") and not find.is_there(tmp_path, "mscoco_captions")


def damage(folder: pathlib.Path, image: bytes) -> None:
  """Of the record that has this image."""
  (shard,) = folder.glob("*.array_record*")
  content = bytearray(shard.read_bytes())
  place = content.index(image)
  content[place : place + len(image)] = bytes(len(image))
  shard.write_bytes(content)


def cifar(root: pathlib.Path) -> pathlib.Path:
  return write(root, "cifar10", class_lists.load()["cifar10"].classnames, {"test": [3, 1, 2]})


def test_a_damaged_record_is_one_line(tmp_path):
  """A figure is of all records or of none."""
  said = "record {} cannot be used: unreadable record; copy it again, or prepare it again"
  damage(cifar(tmp_path), picture(1))
  with pytest.raises(UserError, match=f"1.0.0: {said.format(1)}"):
    read(tmp_path, "cifar10")
  for place, name in enumerate(("banded", "blotchy")):
    (tmp_path / "raw" / name).mkdir(parents=True)
    (tmp_path / "raw" / name / "a.png").write_bytes(picture(place))
  found = image_folder.find_parts(tmp_path / "raw")
  builder.prepare(found, tmp_path / "dtd", builder=image_folder.ImageFolder)
  damage(tmp_path / "dtd", picture(1))
  with pytest.raises(UserError, match=f"dtd: {said.format(1)}"):
    read(tmp_path, "dtd")
  items = [parts.Item(f"raw/{name}/a.png", "a caption") for name in ("banded", "blotchy")]
  builder.prepare(parts.files(items, split="test", root=tmp_path), tmp_path / "coco")
  damage(tmp_path / "coco", picture(0))
  with pytest.raises(UserError, match=f"coco: {said.format(0)}"):
    read(tmp_path, "mscoco_captions")


def test_a_record_that_is_damaged_later_is_unusable(tmp_path):
  folder = cifar(tmp_path)
  source = read(tmp_path, "cifar10")
  damage(folder, picture(1))
  with pytest.raises(records.Unusable, match="unreadable record"):
    source[1]


def test_it_is_no_data_set_to_train_on(tmp_path):
  with pytest.raises(UserError, match="was not written by prepare_data: its records have image, label; write"):
    sources.open_source(name="pairs", path=cifar(tmp_path), split="test", image_size=8)


def test_captions_of_fields_that_its_records_lack(tmp_path):
  cifar(tmp_path)
  make = lambda *fields: sources.open_source(name="cifar10", path=tmp_path, image_size=8, caption_fields=fields)
  assert make("class")[0]["captions"] == ["cat"]
  with pytest.raises(UserError, match="cifar10 has no caption field 'title'; its records have caption, class, label"):
    make("class", "title")


def test_a_record_that_is_damaged_later_is_one_line_too(tmp_path, monkeypatch):
  """A run measures hours after it has opened the set, and saves its steps where that fails so."""

  def unreadable(*_):
    raise records.Unusable("unreadable record")

  cifar(tmp_path)
  source = read(tmp_path, "cifar10")
  monkeypatch.setattr(records.Stored, "_read", unreadable)
  with pytest.raises(
    UserError, match="^record 1 of the data set cannot be used: unreadable record; download or prepare it again"
  ):
    base.Images(source, np.arange(3), 4)[np.array([1])]
