"""`prepare_data files` reads folders of one's own pictures in every layout."""

from __future__ import annotations

import csv
import itertools
import json
import pathlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffdis_jax.data.prepare import own, write
from diffdis_jax.data.prepare.tables import Asked
from diffdis_jax.errors import UserError
from tests.raw_pairs import columns, load, picture, put

COUNT = 40


def beside(folder: pathlib.Path, count: int = COUNT) -> pathlib.Path:
  """Write x.png with x.txt or x.caption, in two folders."""
  for i in range(count):
    put(folder / f"set{i % 2}" / f"{i:03d}.png", picture(i))
    put(folder / f"set{i % 2}" / f"{i:03d}.{'txt' if i % 3 else 'caption'}", f"picture {i}\n")
  return folder


def prepared(source: pathlib.Path, out: pathlib.Path, **asked):
  parts = own.find_parts(source, Asked(**asked))
  return write.prepare(parts, out, data_set=own.OWN)


def captions(out: pathlib.Path, *splits: str) -> dict[str, str]:
  return {record["key"]: record["caption"] for split in splits for record in load(out, split)}


def test_files_beside_each_other(tmp_path):
  source = beside(tmp_path / "raw")
  put(source / "set0" / "alone.jpg", picture(99, "JPEG"))
  put(source / "nobody.txt", "no picture")
  put(source / "broken.png", "no image")
  put(source / "broken.txt", "x")
  put(source / ".hidden.txt", "x")
  put(source / "set1" / "001.json", json.dumps({"place": "here"}))
  reports = prepared(source, tmp_path / "out")
  assert list(reports) == ["train", "val"] and reports["val"].pairs >= 1
  skipped = [reports[split].skipped for split in reports]
  assert {reason: sum(counts.get(reason, 0) for counts in skipped) for counts in skipped for reason in counts} == {
    "missing caption": 1,
    "missing image": 1,
    "corrupt image": 1,
  }
  stored = captions(tmp_path / "out", "train", "val")
  assert stored == {f"set{i % 2}/{i:03d}": f"picture {i}" for i in range(COUNT)}
  places = {record["key"]: record.get("place") for split in reports for record in load(tmp_path / "out", split)}
  assert places["set1/001"] == "here"


def test_what_is_held_out_stays_so(tmp_path):
  held = {}
  for name, count in (("few", COUNT), ("more", COUNT + 20)):
    prepared(beside(tmp_path / name, count), tmp_path / f"{name}.out", held_out=0.2)
    held[name] = captions(tmp_path / f"{name}.out", "val").keys()
  assert 2 <= len(held["few"]) <= 16 and held["few"] <= held["more"]
  assert not held["more"] & captions(tmp_path / "more.out", "train").keys()
  assert list(prepared(beside(tmp_path / "none"), tmp_path / "none.out", held_out=0.0)) == ["train"]
  reports = prepared(beside(tmp_path / "two", 2), tmp_path / "two.out", held_out=1e-9)
  assert [reports[split].pairs for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Train", "Validation", "TEST")])
def test_folders_that_are_splits_stay_splits(tmp_path, names):
  for split in names:
    beside(tmp_path / "raw" / split, 4)
  reports = prepared(tmp_path / "raw", tmp_path / "out")
  assert {split: report.pairs for split, report in reports.items()} == {"train": 4, "val": 4, "test": 4}


@pytest.mark.parametrize("stray", ["README.txt", "banner.png", "more/banner.png"])
@pytest.mark.parametrize("table", [False, True])
def test_a_file_beside_folders_that_are_splits_mixes_none_of_them(tmp_path, stray, table):
  source = tmp_path / "raw"
  for split in ("train", "val"):
    beside(source / split, 4)
  put(source / stray, picture(0) if stray.endswith(".png") else "about these pictures")
  if table:
    names = [path.relative_to(source) for path in source.glob("*/set*/*.png")]
    put(source / "metadata.csv", "file_name,text\n" + "".join(f"{name},x\n" for name in names))
  reports = prepared(source, tmp_path / "out")
  assert {split: report.pairs for split, report in reports.items()} == {"train": 4, "val": 4}
  lacks = {} if table and stray.endswith(".txt") else {f"missing {'caption' if stray.endswith('.png') else 'image'}": 1}
  assert reports["train"].skipped == lacks and not reports["val"].skipped


def five_captions(folder: pathlib.Path, layout: str, count: int = COUNT) -> pathlib.Path:
  """Write a row for each of five captions of each picture, not side by side, in one of the layouts."""
  rows = [(i, f"caption {j} of {i}") for j in range(5) for i in range(count)]
  if layout == "parquet":
    half = len(rows) // 2
    for name, part in (("0", rows[:half]), ("1", rows[half:])):
      put(folder / f"{name}.parquet", columns(image=[picture(i) for i, _ in part], text=[text for _, text in part]))
  elif layout == "jsonl":
    for i in range(count):
      put(folder / f"{i}.png", picture(i))
    put(folder / "metadata.jsonl", "".join(json.dumps({"file_name": f"{i}.png", "text": t}) + "\n" for i, t in rows))
  else:
    for number, (i, text) in enumerate(rows):
      put(folder / f"{number}.png", picture(i))
      put(folder / f"{number}.txt", text)
  return folder


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "beside"])
def test_rows_with_the_same_image_are_one_record_and_held_out_together(tmp_path, layout):
  reports = prepared(five_captions(tmp_path / "raw", layout), tmp_path / "out", held_out=0.2)
  stored = {split: load(tmp_path / "out", split) for split in reports}
  images = {split: {record["image"] for record in stored[split]} for split in stored}
  assert not images["train"] & images["val"] and len(images["train"] | images["val"]) == COUNT
  assert reports["train"].pairs + reports["val"].pairs == COUNT and reports["val"].pairs > 1
  texts = [sorted(record["captions"]) for records in stored.values() for record in records]
  assert sorted(texts) == sorted([f"caption {j} of {i}" for j in range(5)] for i in range(COUNT))
  assert all(record["caption"] in record["captions"] for records in stored.values() for record in records)


def test_a_row_without_a_caption_that_can_be_used_takes_none_from_the_others(tmp_path):
  source = tmp_path / "raw"
  texts = {"a": b"\xff\xfe\xc3", "b": b"one", "c": b"", "d": b"two", "e": b"one"}
  for name, text in texts.items():
    put(source / f"{name}.png", picture(0))
    put(source / f"{name}.txt", text)
  put(source / "d.json", json.dumps({"captions": ["two", "three"], "place": "here"}))
  reports = prepared(source, tmp_path / "out", held_out=0.0)
  (record,) = load(tmp_path / "out", "train")
  assert (record["key"], record["caption"], record["captions"]) == ("b", "one", ["one", "two", "three"])
  assert reports["train"].skipped == {"caption that is not UTF-8": 1, "missing caption": 1}


@pytest.mark.parametrize("named", [True, False])
def test_equal_images_of_two_splits_are_counted_in_one_line(tmp_path, caplog, named):
  for i, split in enumerate(("train", "train", "train", "val", "val")):
    put(tmp_path / "raw" / split / "a" / f"{i}.png", picture(i % 3))
    put(tmp_path / "raw" / split / "a" / f"{i}.txt", f"{i}")
  if named:
    reports = prepared(tmp_path / "raw", tmp_path / "out")
  else:
    reports = write.prepare(own.classes(tmp_path / "raw"), tmp_path / "out")
  assert reports["val"].shared == {"train": 2} and not reports["train"].shared
  (line,) = [record.getMessage() for record in caplog.records if "same bytes" in record.getMessage()]
  assert "2 of 2 images of val have the same bytes as images of train" in line


def rows(count: int = COUNT) -> list[dict]:
  return [{"file_name": f"images/{i}.png", "text": f"picture {i}", "short": f"{i}", "stars": i} for i in range(count)]


@pytest.mark.parametrize("more, flags", [("", {}), (",7", {"caption_fields": ("beschreibung",)})])
def test_a_table_with_headings_of_its_own(tmp_path, more, flags):
  """A column whose first value is a picture there has the files; the only other one has the captions."""
  for i in range(4):
    put(tmp_path / "raw" / f"{i}.png", picture(i))
  rows = "".join(f"{i}.png,bild {i}{more}\n" for i in range(4))
  put(tmp_path / "raw" / "tabelle.csv", f"bild,beschreibung{',n' if more else ''}\n{rows}")
  prepared(tmp_path / "raw", tmp_path / "out", held_out=0, **flags)
  assert captions(tmp_path / "out", "train") == {f"{i}.png": f"bild {i}" for i in range(4)}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_hugging_faces_metadata(tmp_path, kind):
  source = tmp_path / "raw"
  for i in range(COUNT + 1):  # the last is in no row
    put(source / "images" / f"{i}.png", picture(i))
  table = [*rows(), {**rows(1)[0], "file_name": "images/gone.png"}]
  if kind == "jsonl":
    put(source / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in table))
  elif kind == "parquet":
    pq.write_table(pa.Table.from_pylist(table), source / "metadata.parquet")
  else:
    with open(source / "metadata.csv", "w", newline="") as file:
      writer = csv.DictWriter(file, table[0])
      writer.writeheader()
      writer.writerows(table)
  reports = prepared(source, tmp_path / "out", caption_fields=("text", "short"))
  assert sum(report.pairs for report in reports.values()) == COUNT
  assert reports["train"].skipped == {"missing image": 1, "missing caption": 1}
  record = load(tmp_path / "out", "val")[0]
  number = int(record["key"].removesuffix(".png").removeprefix("images/"))
  assert record["captions"] == [f"picture {number}", f"{number}"] and int(record["stars"]) == number
  assert set(captions(tmp_path / "out", "train", "val").values()) == {f"picture {i}" for i in range(COUNT)}


@pytest.mark.parametrize("name", ["images\\e\u0301.png", "images/\u00e9.png", "images/e\u0301.png"])
def test_a_table_of_another_system_names_its_files_otherwise(tmp_path, name):
  """Windows writes a backslash, and macOS writes é with an accent of its own."""
  for stored in ("\u00e9", "e\u0301"):
    source = tmp_path / stored
    put(source / "images" / f"{stored}.png", picture(0))
    put(source / "metadata.csv", f"file_name,text\n{name},x\n")
    reports = prepared(source, tmp_path / f"{stored}.out", held_out=0.0)
    assert (reports["train"].pairs, reports["train"].skipped) == (1, {})
    assert captions(tmp_path / f"{stored}.out", "train") == {f"images/{stored}.png": "x"}


@pytest.mark.parametrize("edited", ["nothing", "caption", "image", "parquet"])
def test_a_killed_preparation_takes_no_part_of_files_that_were_edited(tmp_path, monkeypatch, edited):
  """Parts of old files would mix old and new captions."""
  source = tmp_path / "raw"
  if edited == "parquet":
    write_table(source / "0.parquet", "datasets")
  else:
    beside(source)
  monkeypatch.setattr(own, "ITEMS", 10)
  original, count = write.Stage.write, itertools.count()

  def killed(stage, part):
    if next(count) == (1 if edited == "parquet" else 2):
      raise KeyboardInterrupt
    return original(stage, part)

  monkeypatch.setattr(write.Stage, "write", killed)
  with pytest.raises(KeyboardInterrupt):
    prepared(source, tmp_path / "out")
  monkeypatch.setattr(write.Stage, "write", original)
  if edited == "parquet":
    write_table(source / "0.parquet", "datasets", seed=COUNT)
  else:
    pattern = {"caption": "*.txt", "image": "*.png"}.get(edited, "none")
    for i, file in enumerate(sorted(source.rglob(pattern))):
      put(file, picture(COUNT + i) if edited == "image" else f"mended {i}")
  prepared(source, tmp_path / "out")
  prepared(source, tmp_path / "direct")
  for split in ("train", "val"):
    assert load(tmp_path / "out", split) == load(tmp_path / "direct", split)


def write_table(path: pathlib.Path, kind: str, count: int = COUNT, *, seed: int = 0) -> None:
  """Write a parquet file as img2dataset or datasets does; img2dataset's last image could not be downloaded."""
  images, names = [picture(seed + i) for i in range(count)], [f"picture {i}" for i in range(count)]
  if kind == "img2dataset":
    keys = [f"{i:09d}" for i in range(count)]
    put(path, columns(key=keys, jpg=[*images[:-1], None], caption=names, exif=["{}"] * count))
  else:
    structs = [{"bytes": image, "path": "x.png"} for image in images]
    put(path, columns(image=structs, text=[[name, f"a {name}"] for name in names]))


def test_img2datasets_parquet(tmp_path):
  for shard in ("00000", "00001"):
    write_table(tmp_path / "raw" / f"{shard}.parquet", "img2dataset", seed=COUNT * int(shard))
  reports = prepared(tmp_path / "raw", tmp_path / "out", held_out=0.2)
  assert sum(report.pairs for report in reports.values()) == 2 * COUNT - 2
  assert sum(report.skipped.get("missing image", 0) for report in reports.values()) == 2
  stored = captions(tmp_path / "out", "train", "val")
  assert stored.keys() == {f"{shard}/{i:09d}" for shard in ("00000", "00001") for i in range(COUNT - 1)}
  assert all(caption == f"picture {int(key[-9:])}" for key, caption in stored.items())


def test_datasets_parquet_has_its_own_splits(tmp_path):
  write_table(tmp_path / "raw" / "data" / "train-00000-of-00001.parquet", "datasets")
  write_table(tmp_path / "raw" / "data" / "validation-00000-of-00001-0123abcd.parquet", "datasets", 5)
  put(tmp_path / "raw" / "README.md", "a card")
  reports = prepared(tmp_path / "raw", tmp_path / "out")
  assert {split: report.pairs for split, report in reports.items()} == {"train": COUNT, "val": 5}
  first = load(tmp_path / "out", "val")[0]
  assert first["captions"] == ["picture 0", "a picture 0"]
  assert first["key"] == "data/validation-00000-of-00001-0123abcd/0"


def test_class_folders_without_captions(tmp_path):
  for name in ("red_apple/1.png", "red_apple/2.png", "star/3.png"):
    put(tmp_path / "raw" / name, picture(int(name[-5])))
  reports = prepared(tmp_path / "raw", tmp_path / "out", held_out=0.0)
  assert reports["train"].pairs == 3
  fields = [(record["caption"], record["class"], record["label"]) for record in load(tmp_path / "out", "train")]
  assert fields == 2 * [("red apple", "red_apple", 0)] + [("star", "star", 1)]
  reports = write.prepare(own.find_parts(tmp_path / "raw", Asked(captions="filename")), tmp_path / "named")
  assert sum(report.pairs for report in reports.values()) == 3


def rows_of(count: int, seed: int = 0) -> datasets.Dataset:
  features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
  data = {"image": [{"bytes": picture(seed + i), "path": None} for i in range(count)], "text": ["x"] * count}
  return datasets.Dataset.from_dict(data, features=features)


@pytest.mark.parametrize("several", [True, False])
def test_a_datasets_folder(tmp_path, several):
  rows = rows_of(2 * COUNT)
  loaded = datasets.DatasetDict({"train": rows, "test": rows_of(5, 1000)}) if several else rows
  loaded.save_to_disk(str(tmp_path / "raw"), **({} if several else {"num_shards": 2}))
  reports = prepared(tmp_path / "raw", tmp_path / "out", held_out=0.1)
  assert reports["train"].pairs + reports["val"].pairs == 2 * COUNT and reports["val"].pairs >= 1
  assert ("test" in reports and reports["test"].pairs == 5) == several


@pytest.mark.parametrize(
  ("split", "splits"),
  [("train[:10%]", ["train", "val"]), ("train[:5]+test[:5]", ["train", "val"]), ("test[10:]", ["test"])],
)
def test_a_part_of_a_split_that_datasets_saved(tmp_path, split, splits):
  """Read what load_dataset(..., split="train[:10%]") and then save_to_disk write."""
  rows_of(COUNT).save_to_disk(str(tmp_path / "raw"))
  state = json.loads((tmp_path / "raw" / "state.json").read_text())
  put(tmp_path / "raw" / "state.json", json.dumps({**state, "_split": split}))
  assert list(prepared(tmp_path / "raw", tmp_path / "out")) == splits


def test_a_list_with_prompts(tmp_path):
  """A column `prompt` has the captions, beside one of another kind."""
  for i in range(COUNT):
    put(tmp_path / "raw" / f"{i}.png", picture(i))
  rows = (json.dumps({"img": f"{i}.png", "prompt": f"text {i}", "score": i}) for i in range(COUNT))
  put(tmp_path / "raw" / "data.jsonl", "\n".join(rows))
  splits = prepared(tmp_path / "raw", tmp_path / "out")
  assert captions(tmp_path / "out", *splits) == {f"{i}.png": f"text {i}" for i in range(COUNT)}


@pytest.mark.parametrize(
  ("content", "asked", "message"),
  [
    ({}, {}, "raw has 0 pictures, and 0 captions, .*; --source is a folder of x.jpg with x.txt"),
    ({"a.png": picture(0)}, {}, "has 1 pictures, such as 'a.png', and 0 captions, .* --captions=filename"),
    ({"0.tar": b""}, {}, "holds tars; type: diffdis prepare_data pairs --source="),
    ({"0.tar": b"", "0.parquet": columns(url=["x"])}, {}, "holds tars; type: diffdis prepare_data pairs --source="),
    ({"a.png": picture(0), "a.txt": b"a"}, {}, "has one pair .*; give at least two, .* or --held_out=0"),
    ({"a.png": picture(0), "a.jpg": picture(1), "a.txt": b"a"}, {}, "a.jpg and a.png, two files for image of one key"),
    ({"a.png": picture(0), "a.txt": b"a"}, {"caption_fields": ("title",)}, "--caption_fields names columns of a table"),
    ({"metadata.jsonl": b'{"text": "a"}\n'}, {}, "has no column of files, such as file_name; its columns are text"),
    (
      {"metadata.jsonl": b'{"file_name": "a.png"}\n'},
      {},
      "has no column caption or text or prompt or description; name those",
    ),
    (
      {"a.png": picture(0), "my list.csv": b"id,picture,what it shows\n1,a.png,a red star\n"},
      {},
      "of what it shows, id, such as --caption_fields='what it shows'",
    ),
    ({"metadata.jsonl": b"{\n"}, {}, "metadata.jsonl, line 1 is not JSON"),
    ({"metadata.csv": b"file_name,text\na.png,a\nb.png,a, b\n"}, {}, "line 3 has more values .*; put quotes around"),
    ({"metadata.csv": b'file_name,text\na.png,a\nb.png,"a\nc.png,c\n'}, {}, "end of data, in the row after line 3"),
    ({"metadata.csv": b"file_name,text\n"}, {}, "has no rows; each is a file_name and a caption"),
    ({"0.parquet": columns(url=["x"], caption=["a"])}, {}, "no column with an image, .* its columns are url, caption"),
    (
      {"0.parquet": columns(image=[b"x"], title=["a"])},
      {},
      "has no column caption or text or prompt or description; .* of title",
    ),
    ({"0.parquet": columns(image=[b"x"], text=["a"])}, {"caption_fields": ("b",)}, "has no column b; name those"),
    ({"0.parquet": b"PAR1"}, {}, "0.parquet cannot be read: .*; copy it again"),
    ({"dataset_dict.json": b"[1]"}, {}, "raw cannot be read: .*; copy it again"),
    ({"a/state.json": b"{}", "a/a.arrow": b"x"}, {}, "has 0 pictures, .*, itself and not one above it"),
  ],
)
def test_bad_sources(tmp_path, content, asked, message):
  (tmp_path / "raw").mkdir()
  for name, data in content.items():
    put(tmp_path / "raw" / name, data)
  with pytest.raises(UserError, match=message) as error:
    own.find_parts(tmp_path / "raw", Asked(**asked))
  assert "\n" not in str(error.value)
