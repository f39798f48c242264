"""What a downloaded folder of raw data may hold: each fault is one line, or its pairs are skipped and counted."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import pytest

from diffdis_jax import prepare_data
from diffdis_jax.data import records
from diffdis_jax.data.prepare import own, write
from diffdis_jax.data.prepare.tables import Asked
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


def table(name: str, text: str | bytes) -> Callable[..., None]:
  """A table beside a good picture. OUT stands for the folder outside."""

  def write(raw: pathlib.Path, outside: pathlib.Path) -> None:
    put(raw / "good.png", picture(0))
    put(raw / name, text.replace("OUT", str(outside)).encode() if isinstance(text, str) else text)

  return write


def karpathy(split: Any, *files: str) -> str:
  images = [{"split": split, "filename": file, "imgid": i, "sentences": [{"raw": "x"}]} for i, file in enumerate(files)]
  return json.dumps({"images": images})


def saved(filename: str = "", splits: Sequence[str] = (), split: str = "train") -> Callable[..., None]:
  """As datasets' save_to_disk writes it, with something else in its state.json or dataset_dict.json."""

  def write(raw: pathlib.Path, outside: pathlib.Path) -> None:
    rows = datasets.Dataset.from_dict({"image": [picture(0)], "text": ["x"]})
    for folder in (raw, outside):
      rows.save_to_disk(str(folder))
    (arrow,) = outside.glob("*.arrow")
    arrow.with_name("data.arrow").write_bytes(arrow.read_bytes())
    state = json.loads((raw / "state.json").read_bytes())
    changed = {"_data_files": [{"filename": filename}]} if filename else {}
    put(raw / "state.json", {**state, "_split": split, **changed})
    if splits:
      (raw / "state.json").unlink()
      put(raw / "dataset_dict.json", {"splits": list(splits)})

  return write


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
FOLDER_FAULTS = {
  "an empty tar": Fault("pairs", lambda raw, _: put(raw / "0.tar"), "no usable pair in split train: no pairs in it"),
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
  "a row out of the folder": Fault(
    "files",
    table("metadata.jsonl", '{"file_name": "OUT/secret.png", "text": "x"}\n{"file_name": "good.png", "text": "x"}'),
    skipped={OUTSIDE: 1},
  ),
  "an arrow file outside": Fault("files", saved("../outside/data.arrow"), "names .*data.arrow, which is not below it"),
  "a split outside": Fault("files", saved(splits=["../outside"]), "outside/data-.*.arrow, which is not below it"),
  "a split that is a path": Fault("files", saved(split="../../outside/x"), "cannot be read: Split name should match"),
  "a split of Karpathy's that is a path": Fault(
    "flickr30k", table("dataset_flickr30k.json", karpathy("../../outside/x", "good.png")), "cannot be called '../../out"
  ),
  "a split of Karpathy's that is none": Fault(
    "flickr30k",
    table("dataset_flickr30k.json", karpathy(3, "good.png")),
    "is not of the form of Karpathy's splits: .*split 3",
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
    find = functools.partial(own.find_parts, asked=Asked(held_out=0.0))
  if fault.message:
    with pytest.raises(UserError, match=fault.message) as error:
      write.prepare(find(raw / below), tmp_path / "out", data_set=kind)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
  else:
    (report,) = write.prepare(find(raw / below), tmp_path / "out", data_set=kind).values()
    assert (report.skipped, report.pairs) == (fault.skipped, fault.pairs)
    (info,) = (json.loads((tmp_path / "out/report.json").read_text()),)
    stored = load(tmp_path / "out", *info)
    assert picture(99) not in [each["image"] for each in stored] and "a secret" not in [e["caption"] for e in stored]
  assert listing(outside) | listing(raw) == before
  assert {path.name for path in tmp_path.iterdir()} <= {"raw", "outside", "out"}
