"""CC3M, COCO and Flickr30k, from the files as they are published."""

import csv
import json
import re

import pytest

from configs import clip_cc3m, diffdis_cc3m
from diffdis_jax.data import sources
from diffdis_jax.data.prepare import own, published, write
from diffdis_jax.errors import UserError
from diffdis_jax.evals.retrieval import Retrieval
from tests.raw_pairs import load, picture, write_tar

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
  settings = write.Settings(short_side=published.SHORT_SIDE)
  return write.prepare(published.find_cc3m(source), out, data_set=published.CC3M, settings=settings)


def test_tars_and_tables_give_the_same_images_and_captions(tmp_path):
  big = picture(1, "JPEG", (400, 300))
  for folder in ("tars", "tables/images"):
    (tmp_path / folder).mkdir(parents=True)
  write_tar(tmp_path / "tars" / "cc3m-train-0000.tar", {"0.jpg": big, "0.txt": "a café".encode()})
  write_tar(tmp_path / "tars" / "cc3m-validation-0000.tar", {"0.jpg": picture(2), "0.txt": b"second"})
  (tmp_path / "tables" / "images" / "1.jpg").write_bytes(big)
  (tmp_path / "tables" / "images" / "2.jpg").write_bytes(picture(2))
  (tmp_path / "tables" / "Train_GCC-training.tsv").write_text(
    "caption\tfilepath\turl\na café\timages/1.jpg\thttp://x\n"
  )
  (tmp_path / "tables" / "Validation_GCC.tsv").write_text("title\timage\nsecond\timages/2.jpg\ngone\timages/3.jpg\n")

  reports = prepare_cc3m(tmp_path / "tars", tmp_path / "a"), prepare_cc3m(tmp_path / "tables", tmp_path / "b")
  assert reports[0]["train"].changed == {"image stored smaller": 1}
  assert reports[1]["val"].skipped == {"missing image": 1}
  (first,), (second,) = load(tmp_path / "a", "train"), load(tmp_path / "b", "train")
  assert (first["caption"], first["image"]) == (second["caption"], second["image"]) and first["caption"] == "a café"
  assert (second["url"], second["key"]) == ("http://x", "images/1.jpg")
  assert load(tmp_path / "a", "val")[0]["image"] == load(tmp_path / "b", "val")[0]["image"] == picture(2)
  assert (tmp_path / "a" / "cc3m-train.array_record-00000-of-00001").exists()


@pytest.mark.parametrize("config", [diffdis_cc3m, clip_cc3m])
def test_configs_find_what_is_held_out_in_the_published_tars(tmp_path, config):
  for name in ("train", "validation"):
    write_tar(tmp_path / f"cc3m-{name}-0000.tar", {"0.jpg": picture(1), "0.txt": name.encode()})
  prepare_cc3m(tmp_path, tmp_path / "out")
  section = config.get_config(f"path={tmp_path / 'out'},held_out={tmp_path / 'out'}").evals.held_out
  assert [record["caption"] for record in sources.open_source(**section.data)] == ["validation"]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("train.tsv", "a caption\thttp://image\n", "the first line must name a column caption and a column filepath, not"),
    ("train.tsv", "", "must name a column caption and a column filepath, not none"),
    ("train.tsv", "caption\tfilepath\n", "train.tsv has no rows"),
    ("pairs.tsv", "caption\tfilepath\na\tb\n", "cannot tell the split of pairs.tsv; name it train.tsv"),
  ],
)
def test_bad_tables(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=re.escape(message)):
    published.find_cc3m(tmp_path)


def test_two_tables_of_a_split(tmp_path):
  for name in ("val.tsv", "validation.tsv"):
    (tmp_path / name).write_text("caption\tfilepath\na\tb\n")
  with pytest.raises(UserError, match="second table of split val"):
    published.find_cc3m(tmp_path)


@pytest.mark.parametrize("name", ["cc3m-train-0000.tar", "00000.tar", "Train_GCC-training.tsv"])
def test_what_macos_leaves_beside_a_file_is_no_part(tmp_path, name):
  """On a disk of another system's it keeps a file's attributes in ._FILE."""
  if name.endswith(".tar"):
    write_tar(tmp_path / name, {"0.jpg": picture(1), "0.txt": b"a"})
  else:
    (tmp_path / name).write_text("caption\tfilepath\na\t1.png\n")
  (tmp_path / f"._{name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
  (part,) = published.find_cc3m(tmp_path)
  assert part.split == "train" and not part.name.startswith(".")


def test_a_table_that_begins_with_a_mark(tmp_path):
  """As a spreadsheet saves it."""
  (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbfcaption\tfilepath\na\t1.png\n")
  (part,) = published.find_cc3m(tmp_path)
  assert [(item.caption, item.file) for item in part.items] == [("a", "1.png")]


def test_odd_rows(tmp_path):
  """A short row, a quote, bytes that are not UTF-8."""
  (tmp_path / "train.tsv").write_bytes(b'caption\tfilepath\nalone\n"quoted\t1.png\n\xff\t1.png\n')
  (tmp_path / "1.png").write_bytes(picture(0))
  reports = prepare_cc3m(tmp_path, tmp_path / "out")
  assert reports["train"].skipped == {"missing image": 1, "caption that is not UTF-8": 1}
  assert load(tmp_path / "out", "train")[0]["caption"] == '"quoted'


def test_captions_with_quotes_as_pandas_writes_them(tmp_path):
  captions = ['the " best " dog', '"hi" he said', '"quoted', "plain", 'a ""', '"']
  with open(tmp_path / "train.tsv", "w", newline="") as file:
    table = csv.writer(file, delimiter="\t")
    table.writerows([["title", "filepath"], *([caption, "1.png"] for caption in captions)])
  (part,) = published.find_cc3m(tmp_path)
  assert [item.caption for item in part.items] == captions


def test_a_caption_of_two_lines_is_refused_and_not_halved(tmp_path):
  for text in ('"a\ncat"', '"a\n\nblack\ncat"'):
    (tmp_path / "train.tsv").write_text(f"caption\tfilepath\nb\t1.png\n{text}\t1.png\n")
    with pytest.raises(UserError, match="line 3: a quoted text goes on in the next line"):
      published.find_cc3m(tmp_path)
  (tmp_path / "train.tsv").write_text('caption\tfilepath\n"cut\nb\t1.png\n"c"\t1.png\n"end')
  (part,) = published.find_cc3m(tmp_path)
  assert [item.caption for item in part.items] == ['"cut', "b", '"c"', '"end']
