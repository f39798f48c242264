"""CC3M, COCO and Flickr30k are read as they are published."""

import functools
import json

import pytest

from diffdis_jax.data.prepare import own, published, write
from diffdis_jax.errors import UserError
from diffdis_jax.evals.retrieval import Retrieval
from tests import raw_pairs
from tests.raw_pairs import load, picture, write_tar

FIVE = [f"caption {i}" for i in range(5)]


def put(path, content):
  raw_pairs.put(path, content if isinstance(content, bytes) else json.dumps(content))


def karpathy(split, file, number, **fields):
  sentences = [{"raw": f" {caption}\n", "tokens": []} for caption in FIVE]
  return {"split": split, "filename": file, "imgid": number, "sentences": sentences, **fields}


@pytest.mark.parametrize("folder", ["flickr30k-images", "Images", ""])
def test_flickr30k(tmp_path, folder):
  images = [karpathy(split, f"{i}.jpg", i) for i, split in enumerate(["train", "test"])]
  put(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
  for i in range(2):
    put(tmp_path / folder / f"{i}.jpg", picture(i, "JPEG"))
  write.prepare(published.find_flickr30k(tmp_path), tmp_path / "out", data_set=published.FLICKR30K)
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
  reports = write.prepare(published.find_coco(tmp_path), tmp_path / "out", data_set=published.COCO)
  assert reports["val"].skipped == {"missing caption": 1}
  (record,) = load(tmp_path / "out", "train")
  assert (record["captions"], record["image_id"], record["key"]) == (FIVE, 7, "train2017/7.jpg")
  put(tmp_path / "annotations" / "captions_train2014.json", {"images": images, "annotations": annotations})
  with pytest.raises(UserError, match="two files of split train; keep those of one year"):
    published.find_coco(tmp_path)


def test_coco_by_karpathy(tmp_path):
  images = [karpathy(split, "1.jpg", i, filepath="val2014") for i, split in enumerate(["restval", "train", "val"])]
  put(tmp_path / "dataset_coco.json", {"images": images})
  put(tmp_path / "images" / "val2014" / "1.jpg", picture(0))
  reports = write.prepare(published.find_coco(tmp_path), tmp_path / "out", data_set=published.COCO)
  assert {split: report.pairs for split, report in reports.items()} == {"train": 2, "val": 1}


@pytest.mark.parametrize(
  ("find", "name", "content", "message"),
  [
    (published.find_coco, "x", b"", "no annotations/captions_train2017.json and no dataset_coco.json in"),
    (published.find_coco, "captions_val2017.json", {"images": []}, "not of the form of COCO's captions: KeyError"),
    (published.find_coco, "captions_val2017.json", b"{", "captions_val2017.json is not JSON: Expecting"),
    (published.find_flickr30k, "x", b"", "no .*dataset_flickr30k.json; it comes with Karpathy's splits"),
    (published.find_flickr30k, "dataset_flickr30k.json", [1], "not of the form of Karpathy's splits"),
    (own.classes, "x", b"", "no images in class folders in"),
  ],
)
def test_bad_sources(tmp_path, find, name, content, message):
  put(tmp_path / name, content)
  with pytest.raises(UserError, match=message):
    find(tmp_path)


def prepare_cc3m(source, out):
  make_stage = functools.partial(write.Stage, short_side=published.SHORT_SIDE)
  return write.prepare(published.find_cc3m(source), out, data_set=published.CC3M, make_stage=make_stage)


def test_images_of_cc3m_are_stored_smaller(tmp_path):
  big = picture(1, "JPEG", (400, 300))
  (tmp_path / "tars").mkdir()
  write_tar(tmp_path / "tars" / "cc3m-train-0000.tar", {"0.jpg": big, "0.txt": "a café".encode()})
  write_tar(tmp_path / "tars" / "cc3m-validation-0000.tar", {"0.jpg": picture(2), "0.txt": b"second"})
  reports = prepare_cc3m(tmp_path / "tars", tmp_path / "out")
  assert reports["train"].pairs == reports["val"].pairs == 1
  assert load(tmp_path / "out", "train")[0]["caption"] == "a café"
  assert load(tmp_path / "out", "val")[0]["image"] == picture(2)
  assert (tmp_path / "out" / "cc3m-train.array_record-00000-of-00001").exists()
