"""The names of class folders are the captions."""

import json

import pytest

from diffdis_jax.data.prepare import own, write
from diffdis_jax.errors import UserError
from tests.raw_pairs import load, picture, put


def test_class_folders(tmp_path):
  for split, name in (("train", "polar_bear"), ("train", "cat"), ("val", "cat")):
    put(tmp_path / "raw" / split / name / "a.PNG", picture(0))
    put(tmp_path / "raw" / split / name / "notes.txt", b"")
  put(tmp_path / "raw" / "val" / "cat" / "b.ppm", picture(1, "PPM"))
  write.prepare(own.classes(tmp_path / "raw"), tmp_path / "out", data_set=own.CLASSES)
  described = [(r["caption"], r["class"], r["label"], r["key"]) for r in load(tmp_path / "out", "train")]
  assert described == [("cat", "cat", 0, "train/cat/a.PNG"), ("polar bear", "polar_bear", 1, "train/polar_bear/a.PNG")]
  assert len(load(tmp_path / "out", "val")) == 2
  put(tmp_path / "raw" / "dog" / "a.png", picture(0))
  with pytest.raises(UserError, match="mixes splits and classes: dog, train, val; if all are classes, move them into"):
    own.classes(tmp_path / "raw")


@pytest.mark.parametrize("name", ["valid", "Validation"])
def test_a_held_out_split_is_val_whatever_its_folder_is_called(tmp_path, name):
  for folder in ("train/cat", f"{name}/cat"):
    put(tmp_path / folder / "a.png", picture(0))
  keys = {part.split: [pair.key for pair in part] for part in own.classes(tmp_path)}
  assert keys == {"train": ["train/cat/a.png"], "val": [f"{name}/cat/a.png"]}
  put(tmp_path / "val" / "cat" / "a.png", picture(0))
  with pytest.raises(UserError, match="has .* and .*, two of one split; leave one of them"):
    own.classes(tmp_path)


def test_a_source_one_folder_too_high_is_no_class(tmp_path):
  for folder in ("imagenette/train/cat", "imagenette/val/cat", "other/cat"):
    put(tmp_path / folder / "a.png", picture(0))
  with pytest.raises(UserError, match="imagenette has the folders train, val; if they are splits, give it as --source"):
    own.classes(tmp_path)
  assert {part.split for part in own.classes(tmp_path / "imagenette")} == {"train", "val"}


@pytest.mark.parametrize(
  ("names", "numbered"),
  [
    (("0", "1", "10", "2"), ("0", "1", "2", "10")),
    (("007", "7", "10"), ("007", "7", "10")),
    (("class10", "class2", "Zebra"), ("Zebra", "class10", "class2")),  # as torchvision's ImageFolder numbers them
    (("10", "2", "cat"), ("10", "2", "cat")),
  ],
)
def test_class_folders_named_by_numbers_are_numbered_in_their_order(tmp_path, names, numbered):
  for name in names:
    put(tmp_path / "train" / name / "a.png", picture(0))
    put(tmp_path / "val" / name / "b.png", picture(1))
  splits = own.classes(tmp_path)
  assert [part.split for part in splits] == ["train", "val"]
  for part in splits:
    fields = [json.loads(pair.metadata) for pair in part.pairs]
    assert [field["class"] for field in fields] == list(numbered)
    assert [field["label"] for field in fields] == [0, 1, 2, 3][: len(names)]
