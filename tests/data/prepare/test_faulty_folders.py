"""What a downloaded folder of raw data may hold: each fault is one line, or its pairs are skipped and counted."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import signal
import types
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffdis_jax import prepare_data
from diffdis_jax.data import records
from diffdis_jax.data.prepare import builder, pictures
from diffdis_jax.data.prepare.own_pairs import Asked
from diffdis_jax.errors import UserError
from tests import benchmark_sets
from tests.raw_pairs import load, picture, write_tar


@dataclasses.dataclass(frozen=True)
class Fault:
  """A folder of raw data with something wrong in it.

  Attributes:
    reader: of prepare_data.
    write: into the folder; the other one is outside of it.
    message: of the error; empty where there is none.
    skipped: reason -> pairs.
    pairs: that are stored.
  """

  reader: str
  write: Callable[[pathlib.Path, pathlib.Path], object]
  message: str = ""
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)
  pairs: int = 1


def put(path: pathlib.Path, content: Any = b"") -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def pair(raw: pathlib.Path, name: str = "good") -> None:
  put(raw / f"{name}.png", picture(0))
  put(raw / f"{name}.txt", b"good")


def fifo(path: pathlib.Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  os.mkfifo(path)


def beside_a_pair(*names: str, how: Callable[[pathlib.Path], object] = fifo) -> Callable[..., None]:
  """A good pair; and where each of the names is, something else."""

  def write(raw: pathlib.Path, outside: pathlib.Path) -> None:
    pair(raw)
    for seed, name in enumerate(names, 1):
      for ending in {".png", ".txt"} - {pathlib.Path(name).suffix}:
        put(raw / pathlib.Path(name).with_suffix(ending), picture(seed) if ending == ".png" else b"x")
      how(raw / name)

  return write


def linked(to: str) -> Callable[[pathlib.Path], object]:
  return lambda path: path.symlink_to(to)


def hub_cache(raw: pathlib.Path, outside: pathlib.Path) -> None:
  """As huggingface_hub keeps a data set: links into a folder beside the one of its revisions."""
  put(raw / "blobs" / "1", picture(0))
  put(raw / "blobs" / "2", b"good")
  (raw / "snapshots" / "r").mkdir(parents=True)
  for name, blob in (("a.png", 1), ("a.txt", 2)):
    (raw / "snapshots" / "r" / name).symlink_to(f"../../blobs/{blob}")


def tar_of(**content: bytes) -> Callable[..., None]:
  return lambda raw, outside: write_tar(raw / "0.tar", {name.replace("_", "."): data for name, data in content.items()})


def empty_members(raw: pathlib.Path, outside: pathlib.Path) -> None:
  write_tar(raw / "0.tar", {f"{i:05d}.{ending}": b"" for i in range(5000) for ending in ("jpg", "txt")})


def names_upwards(raw: pathlib.Path, outside: pathlib.Path) -> None:
  write_tar(raw / "0.tar", {f"../../{outside.name}/a.png": picture(0), f"../../{outside.name}/a.txt": b"good"})


def table(name: str, text: str | bytes) -> Callable[..., None]:
  """A table beside a good picture. OUT stands for the folder outside."""

  def write(raw: pathlib.Path, outside: pathlib.Path) -> None:
    put(raw / "good.png", picture(0))
    put(raw / name, text.replace("OUT", str(outside)).encode() if isinstance(text, str) else text)

  return write


def karpathy(split: Any, *files: str) -> str:
  images = [{"split": split, "filename": file, "imgid": i, "sentences": [{"raw": "x"}]} for i, file in enumerate(files)]
  return json.dumps({"images": images})


def saved(filename: str = "data.arrow", splits: Sequence[str] = (), split: str = "train") -> Callable[..., None]:
  """As datasets' save_to_disk writes it."""

  def write(raw: pathlib.Path, outside: pathlib.Path) -> None:
    for folder in (raw, outside, *(raw / each for each in splits)):
      put(folder / "state.json", {"_data_files": [{"filename": filename}], "_split": split})
      write_arrow(folder / "data.arrow")
    if splits:
      put(raw / "dataset_dict.json", {"splits": list(splits)})

  return write


def write_arrow(path: pathlib.Path) -> None:
  rows = pa.table({"image": [picture(i) for i in range(100)], "text": ["x"] * 100})
  with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
    writer.write_table(rows, max_chunksize=10)


def classes(raw: pathlib.Path, outside: pathlib.Path) -> None:
  for name in ("a\x1b[31m\nb", "..b", "-rf", "c" * 255):
    put(raw / name / "a.png", picture(0))
  fifo(raw / "..b" / "b.png")
  (raw / "-rf" / "b.png").symlink_to(outside / "secret.png")
  (raw / "-rf" / "loop").symlink_to("..")


def dtd(*lines: str) -> Callable[..., None]:
  def write(raw: pathlib.Path, outside: pathlib.Path) -> None:
    benchmark_sets.dtd(raw)
    (raw / "dtd/dtd/labels/test1.txt").write_text("\n".join(lines).replace("OUT", str(outside)))

  return write


PLAIN, LARGE, OUTSIDE = records.NOT_PLAIN, records.TOO_LARGE, records.OUTSIDE
TSV = "caption\tfilepath\ngood\tgood.png\n"
FOLDER_FAULTS = {
  "a pipe for a tar": Fault("pairs", lambda raw, _: fifo(raw / "0.tar"), "0.tar is no plain file; remove it"),
  "a folder for a tar": Fault("pairs", lambda raw, _: (raw / "0.tar").mkdir(), "0.tar is no plain file; remove it"),
  "an empty tar": Fault("pairs", lambda raw, _: put(raw / "0.tar"), "no usable pair in split train: no pairs in it"),
  "10,000 empty members": Fault("pairs", empty_members, "no usable pair in split train: 5000 with missing caption"),
  "members that are called ..": Fault("pairs", names_upwards),
  "long texts in a tar": Fault("pairs", tar_of(a_png=picture(0), a_txt=b"a" * 2**22 + b"b"), "1 with " + LARGE),
  "pipes": Fault("files", beside_a_pair("a.png", "b.txt"), skipped={PLAIN: 2}),
  "links out": Fault(
    "files",
    beside_a_pair("a.png", "b.txt", how=lambda path: path.symlink_to(f"../outside/secret{path.suffix}")),
    skipped={OUTSIDE: 2},
  ),
  "links within": Fault(
    "files", beside_a_pair("a.png", "b.txt", how=lambda p: p.symlink_to("good" + p.suffix)), pairs=2
  ),
  "links to nothing": Fault("files", beside_a_pair("a.png", how=linked("gone.png")), skipped={"missing image": 1}),
  "links to themselves": Fault("files", beside_a_pair("a.png", how=linked("a.png")), skipped={"missing image": 1}),
  "a hub's cache": Fault("files snapshots/r", hub_cache),
  "a link to a folder outside": Fault("files", beside_a_pair("more", how=linked("../outside")), skipped={}, pairs=2),
  "sparse files of 3 TB": Fault(
    "files",
    beside_a_pair("a.png", "b.txt", how=lambda path: (path.touch(), os.truncate(path, 3 * 10**12))),
    skipped={LARGE: 2},
  ),
  "empty files": Fault(
    "files",
    beside_a_pair("a.png", "b.txt", how=lambda path: path.touch()),
    skipped={"missing image": 1, "missing caption": 1},
  ),
  "a pipe for a metadata.jsonl": Fault("files", lambda raw, _: fifo(raw / "metadata.jsonl"), "jsonl is no plain file"),
  "a pipe for a metadata.csv": Fault("files", lambda raw, _: fifo(raw / "metadata.csv"), "csv is no plain file"),
  "a line without end": Fault("files", table("metadata.jsonl", b" " * 2**23), "metadata.jsonl, line 1 has more than"),
  "a row without end": Fault(
    "files", table("metadata.csv", b"file_name,text\n" + b"a" * 2**23), "line 2 has more than"
  ),
  "a row out of the folder": Fault(
    "files", table("metadata.jsonl", '{"file_name": "OUT/secret.png", "text": "x"}'), "which is no picture below"
  ),
  "a pipe for a parquet": Fault("files", lambda raw, _: fifo(raw / "0.parquet"), "0.parquet is no plain file"),
  "a pipe for a state.json": Fault("files", lambda raw, _: fifo(raw / "state.json"), "state.json is no plain file"),
  "an arrow file outside": Fault("files", saved("../outside/data.arrow"), "names ../outside/data.arrow, which is not"),
  "a split outside": Fault("files", saved(splits=["../outside"]), "names ../outside/state.json, which is not below"),
  "a split that is a path": Fault("files", saved(split="../../outside/x"), "cannot be called '../../outside/x'"),
  "a split of control characters": Fault("files", saved(split="a\x1b[31m\nb"), "cannot be called 'a.x1b.31m.nb'"),
  "a pipe for a tsv": Fault("cc3m", lambda raw, _: fifo(raw / "train.tsv"), "train.tsv is no plain file"),
  "rows out of the folder": Fault(
    "cc3m",
    table("train.tsv", f"{TSV}x\t../outside/secret.png\nx\tOUT/secret.png\nx\ta/../../x.png\nx\ta\0.png\n"),
    skipped={OUTSIDE: 3, "missing image": 1},
  ),
  "a cell without end": Fault("cc3m", table("train.tsv", TSV.encode() + b"a" * 2**23), "line 3 has more than"),
  "a pipe for annotations": Fault(
    "coco", lambda raw, _: fifo(raw / "annotations/captions_train2017.json"), "train2017.json is no plain file"
  ),
  "a split of Karpathy's that is a path": Fault(
    "flickr30k", table("dataset_flickr30k.json", karpathy("../../outside/x", "good.png")), "cannot be called '../../out"
  ),
  "a split of Karpathy's that is none": Fault(
    "flickr30k",
    table("dataset_flickr30k.json", karpathy(3, "good.png")),
    "is not of the form of Karpathy's splits: .*split 3",
  ),
  "a split of every name": Fault(
    "flickr30k", table("dataset_flickr30k.json", karpathy("all", "good.png")), "cannot be called 'all'"
  ),
  "images of Karpathy's outside": Fault(
    "flickr30k",
    table("dataset_flickr30k.json", karpathy("test", "good.png", "../outside/secret.png")),
    skipped={OUTSIDE: 1},
  ),
  "strange classes": Fault("folder", classes, skipped={PLAIN: 1, OUTSIDE: 1}, pairs=4),
  "an image of a list outside": Fault("dtd", dtd("banded/../../../../../outside/secret.jpg"), "torchvision cannot"),
  "a path of a list outside": Fault("dtd", dtd("OUT/secret.jpg"), "torchvision cannot read dtd"),
}


@pytest.fixture
def within_seconds():
  """A pipe that is opened, and a table without end, take for ever."""

  def stop(*_):
    pytest.fail("it takes for ever")

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(60)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def listing(folder: pathlib.Path) -> dict[str, float]:
  return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("name", FOLDER_FAULTS)
def test_a_folder_with_a_fault(tmp_path, within_seconds, name):
  fault, raw, outside = FOLDER_FAULTS[name], tmp_path / "raw", tmp_path / "outside"
  raw.mkdir()
  put(outside / "secret.png", picture(99))
  put(outside / "secret.jpg", picture(99))
  put(outside / "secret.txt", b"a secret")
  fault.write(raw, outside)
  before, (reader, _, below) = listing(outside) | listing(raw), fault.reader.partition(" ")
  find, kind = prepare_data.DATA_SETS[reader]
  if reader == "files":
    find = functools.partial(pictures.find_parts, asked=Asked(held_out=0.0))
  if fault.message:
    with pytest.raises(UserError, match=fault.message) as error:
      builder.prepare(find(raw / below), tmp_path / "out", builder=kind)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
  else:
    (report,) = builder.prepare(find(raw / below), tmp_path / "out", builder=kind).values()
    assert (report.skipped, report.pairs) == (fault.skipped, fault.pairs)
    (info,) = (json.loads((tmp_path / "out/report.json").read_text()),)
    stored = load(tmp_path / "out", *info)
    assert picture(99) not in [each["image"] for each in stored] and "a secret" not in [e["caption"] for e in stored]
  assert listing(outside) | listing(raw) == before
  assert {path.name for path in tmp_path.iterdir()} <= {"raw", "outside", "out"}


def test_a_table_of_absurdly_many_rows(tmp_path, monkeypatch):
  pq.write_table(pa.table({"image": [picture(0)], "text": ["x"]}), tmp_path / "0.parquet")
  monkeypatch.setattr(pq, "read_metadata", lambda path: types.SimpleNamespace(num_rows=10**12))
  with pytest.raises(UserError, match="0.parquet says that it has 1,000,000,000,000 rows, in .* bytes; copy it again"):
    pictures.find_parts(tmp_path, Asked())


@pytest.mark.parametrize("name", ["data.arrow", "data.parquet"])
def test_a_table_that_becomes_shorter_while_it_is_read(tmp_path, name):
  raw = tmp_path / "raw"
  if name == "data.arrow":
    saved()(raw, tmp_path / "outside")
  else:
    raw.mkdir()
    rows = pa.table({"image": [os.urandom(10**4) for _ in range(500)], "text": ["x"] * 500})
    pq.write_table(rows, raw / name, row_group_size=50, use_dictionary=False)
  (part,) = pictures.find_parts(raw, Asked(held_out=0.0))
  reading = iter(part)
  next(reading)
  os.truncate(raw / name, (raw / name).stat().st_size // 3)
  with pytest.raises(UserError, match=f"{name} cannot be read: .*; copy it again"):
    list(reading)
