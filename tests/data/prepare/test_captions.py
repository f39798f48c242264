import json

import pytest

from diffdis_jax.data.prepare import builder, captions, image_folder
from diffdis_jax.errors import UserError
from diffdis_jax.evals.retrieval import Retrieval
from tests.raw_pairs import load, picture

FIVE = [f"caption {i}" for i in range(5)]


def put(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def karpathy(split, file, number, **fields):
  sentences = [{"raw": f" {caption}\n", "tokens": []} for caption in FIVE]
  return {"split": split, "filename": file, "imgid": number, "sentences": sentences, **fields}


@pytest.mark.parametrize("folder", ["flickr30k-images", "Images", ""])
def test_flickr30k(tmp_path, folder):
  table = {
    "dataset": "flickr30k",
    "images": [karpathy(split, f"{i}.jpg", i) for i, split in enumerate(["train", "test"])],
  }
  put(tmp_path / "dataset_flickr30k.json", table)
  for i in range(2):
    put(tmp_path / folder / f"{i}.jpg", picture(i, "JPEG"))
  builder.prepare(captions.find_flickr30k(tmp_path), tmp_path / "out", builder=captions.Flickr30k)
  (record,) = load(tmp_path / "out", "test")
  assert (record["caption"], record["captions"], record["image_id"]) == (FIVE[0], FIVE, 1)
  data = dict(name="pairs", path=str(tmp_path / "out"), split="test", image_size=8)
  assert Retrieval(data=data, caption_field="captions").texts == FIVE


def test_coco_by_its_own_files(tmp_path):
  annotations = [{"image_id": 7, "caption": caption, "id": i} for i, caption in enumerate(FIVE)]
  images = [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}]
  for split in ("train", "val"):
    put(tmp_path / "annotations" / f"captions_{split}2017.json", {"images": images, "annotations": annotations})
    put(tmp_path / f"{split}2017" / "7.jpg", picture(0))
    put(tmp_path / f"{split}2017" / "3.jpg", picture(1))
  put(tmp_path / "annotations" / "instances_train2017.json", {})
  reports = builder.prepare(captions.find_coco(tmp_path), tmp_path / "out", builder=captions.Coco)
  assert reports["val"].skipped == {"missing caption": 1}
  (record,) = load(tmp_path / "out", "train")
  assert (record["captions"], record["image_id"], record["key"]) == (FIVE, 7, "train2017/7.jpg")
  put(tmp_path / "annotations" / "captions_train2014.json", {"images": images, "annotations": annotations})
  with pytest.raises(UserError, match="two files of split train; keep those of one year"):
    captions.find_coco(tmp_path)


def test_coco_by_karpathy(tmp_path):
  images = [karpathy(split, "1.jpg", i, filepath="val2014") for i, split in enumerate(["restval", "train", "val"])]
  put(tmp_path / "dataset_coco.json", {"images": images})
  put(tmp_path / "images" / "val2014" / "1.jpg", picture(0))
  reports = builder.prepare(captions.find_coco(tmp_path), tmp_path / "out", builder=captions.Coco)
  assert {split: report.pairs for split, report in reports.items()} == {"train": 2, "val": 1}


@pytest.mark.parametrize(
  ("find", "name", "content", "message"),
  [
    (captions.find_coco, "x", b"", "no annotations/captions_train2017.json and no dataset_coco.json in"),
    (captions.find_coco, "captions_val2017.json", {"images": []}, "not of the form of COCO's captions: KeyError"),
    (captions.find_coco, "captions_val2017.json", b"{", "captions_val2017.json is not JSON: Expecting"),
    (captions.find_flickr30k, "x", b"", "no .*dataset_flickr30k.json; it comes with Karpathy's splits"),
    (captions.find_flickr30k, "dataset_flickr30k.json", [1], "not of the form of Karpathy's splits"),
    (image_folder.find_parts, "x", b"", "no images in class folders in"),
  ],
)
def test_bad_sources(tmp_path, find, name, content, message):
  put(tmp_path / name, content)
  with pytest.raises(UserError, match=message):
    find(tmp_path)


def test_class_folders(tmp_path):
  for split, name in (("train", "polar_bear"), ("train", "cat"), ("val", "cat")):
    put(tmp_path / "raw" / split / name / "a.PNG", picture(0))
    put(tmp_path / "raw" / split / name / "notes.txt", b"")
  put(tmp_path / "raw" / "val" / "cat" / "b.ppm", picture(1, "PPM"))
  builder.prepare(image_folder.find_parts(tmp_path / "raw"), tmp_path / "out", builder=image_folder.ImageFolder)
  described = [(r["caption"], r["class"], r["label"], r["key"]) for r in load(tmp_path / "out", "train")]
  assert described == [("cat", "cat", 0, "train/cat/a.PNG"), ("polar bear", "polar_bear", 1, "train/polar_bear/a.PNG")]
  assert len(load(tmp_path / "out", "val")) == 2
  (tmp_path / "raw" / "dog").mkdir()
  with pytest.raises(UserError, match="mixes splits and classes: dog, train, val; if all are classes, move them into"):
    image_folder.find_parts(tmp_path / "raw")


def test_splits_in_capitals_are_no_classes(tmp_path):
  for name in ("Train/cat", "TEST/cat"):
    put(tmp_path / name / "a.png", picture(0))
  found = {part.split: [pair.caption for pair in part] for part in image_folder.find_parts(tmp_path)}
  assert found == {"train": [b"cat"], "test": [b"cat"]}
  put(tmp_path / "train" / "dog" / "a.png", picture(0))
  with pytest.raises(UserError, match="mixes splits and classes: TEST, Train, train"):
    image_folder.find_parts(tmp_path)


@pytest.mark.parametrize("name", ["valid", "Validation"])
def test_a_held_out_split_is_val_whatever_its_folder_is_called(tmp_path, name):
  for folder in ("train/cat", f"{name}/cat"):
    put(tmp_path / folder / "a.png", picture(0))
  found = {part.split: [pair.key for pair in part] for part in image_folder.find_parts(tmp_path)}
  assert found == {"train": ["train/cat/a.png"], "val": [f"{name}/cat/a.png"]}
  put(tmp_path / "val" / "cat" / "a.png", picture(0))
  with pytest.raises(UserError, match="has .* and .*, each of which would be split val; leave one of them"):
    image_folder.find_parts(tmp_path)


def test_a_source_one_folder_too_high_is_no_class(tmp_path):
  for folder in ("imagenette/train/cat", "imagenette/val/cat", "other/cat"):
    put(tmp_path / folder / "a.png", picture(0))
  with pytest.raises(UserError, match="imagenette has the folders train, val; if they are splits, give it as --source"):
    image_folder.find_parts(tmp_path)
  assert {part.split for part in image_folder.find_parts(tmp_path / "imagenette")} == {"train", "val"}


def test_what_an_editor_or_a_system_hides_is_no_class_and_no_image(tmp_path):
  for name in ("cat/1.png", "dog/1.png", "cat/._1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png"):
    put(tmp_path / "alone" / name, picture(0))
    put(tmp_path / "split" / "train" / name, picture(0))
  put(tmp_path / "split" / ".git" / "1.png", picture(0))
  for source, begin in ((tmp_path / "alone", ""), (tmp_path / "split", "train/")):
    (part,) = image_folder.find_parts(source)
    found = [(item.file, json.loads(item.metadata)["label"]) for item in part.items]
    assert found == [(f"{begin}cat/1.png", 0), (f"{begin}dog/1.png", 1)]


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
  found = image_folder.find_parts(tmp_path)
  assert [part.split for part in found] == ["train", "val"]
  for part in found:
    fields = [json.loads(item.metadata) for item in part.items]
    assert [field["class"] for field in fields] == list(numbered)
    assert [field["label"] for field in fields] == [0, 1, 2, 3][: len(names)]
