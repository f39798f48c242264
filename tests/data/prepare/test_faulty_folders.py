"""Each fault of a downloaded folder is one line, or its pairs are skipped and counted."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from diffdis_jax import prepare_data
from diffdis_jax.data import records
from diffdis_jax.data.prepare import own, write
from diffdis_jax.data.prepare.tables import Asked
from diffdis_jax.errors import UserError
from tests.raw_pairs import load, picture, put, write_tar

Write = Callable[[pathlib.Path], object]


def beside_a_pair(*names: str, how: Write = os.mkfifo) -> Write:
  """Make a good pair, and something else where each of the names is."""

  def write_them(raw: pathlib.Path) -> None:
    put(raw / "good.png", picture(0))
    put(raw / "good.txt", b"good")
    for seed, name in enumerate(names, 1):
      for ending in {".png", ".txt"} - {pathlib.Path(name).suffix}:
        put(raw / pathlib.Path(name).with_suffix(ending), picture(seed) if ending == ".png" else b"x")
      how(raw / name)

  return write_them


def hub_cache(raw: pathlib.Path) -> None:
  """Make a data set as huggingface_hub keeps it: links into a folder beside the one of its revisions."""
  put(raw / "blobs" / "1", picture(0))
  put(raw / "blobs" / "2", b"good")
  (raw / "snapshots" / "r").mkdir(parents=True)
  for name, blob in (("a.png", 1), ("a.txt", 2)):
    (raw / "snapshots" / "r" / name).symlink_to(f"../../blobs/{blob}")


def table(name: str, text: str) -> Write:
  """Make a table beside a good picture. OUT stands for the folder outside."""
  return lambda raw: (put(raw / "good.png", picture(0)), put(raw / name, text.replace("OUT", f"{raw}/../outside")))


def karpathy(split: Any, *files: str) -> str:
  images = [{"split": split, "filename": file, "imgid": i, "sentences": [{"raw": "x"}]} for i, file in enumerate(files)]
  return json.dumps({"images": images})


def saved(raw: pathlib.Path) -> None:
  """Save by datasets a folder whose state.json names a file outside."""
  rows = datasets.Dataset.from_dict({"image": [picture(0)], "text": ["x"]})
  for folder in (raw, raw.parent / "outside"):
    rows.save_to_disk(str(folder))
  state = json.loads((raw / "state.json").read_bytes())
  (arrow,) = (raw.parent / "outside").glob("*.arrow")
  put(raw / "state.json", json.dumps({**state, "_data_files": [{"filename": f"../outside/{arrow.name}"}]}))


PLAIN, LARGE, OUTSIDE = records.NOT_PLAIN, records.TOO_LARGE, records.OUTSIDE
FLICKR, OUT_ROW = "dataset_flickr30k.json", '{"file_name": "OUT/secret.png", "text": "x"}\n'
# Name -> reader of prepare_data, what writes the folder, and the error's message or the pairs that are skipped.
FAULTS: dict[str, tuple[str, Write, str | dict[str, int]]] = {
  "an empty tar": ("pairs", lambda raw: put(raw / "0.tar", b""), "no usable pair in split train: no pairs in it"),
  "long texts in a tar": (
    "pairs",
    lambda raw: write_tar(raw / "0.tar", {"a.png": picture(0), "a.txt": b"a" * 2**22 + b"b"}),
    "1 with " + LARGE,
  ),
  "pipes": ("files", beside_a_pair("a.png", "b.txt"), {PLAIN: 2}),
  "links out": (
    "files",
    beside_a_pair("a.png", "b.txt", how=lambda path: path.symlink_to(f"../outside/secret{path.suffix}")),
    {OUTSIDE: 2},
  ),
  "links within": ("files", beside_a_pair("a.png", "b.txt", how=lambda p: p.symlink_to("good" + p.suffix)), {}),
  "links to nothing": ("files", beside_a_pair("a.png", how=lambda p: p.symlink_to("no.png")), {"missing image": 1}),
  "a hub's cache": ("files snapshots/r", hub_cache, {}),
  "sparse files of 3 TB": (
    "files",
    beside_a_pair("a.png", "b.txt", how=lambda path: (path.touch(), os.truncate(path, 3 * 10**12))),
    {LARGE: 2},
  ),
  "a row out of the folder": (
    "files",
    table("metadata.jsonl", OUT_ROW + '{"file_name": "good.png", "text": "x"}'),
    {OUTSIDE: 1},
  ),
  "an arrow file outside": ("files", saved, "names .*.arrow, which is not below it"),
  "a split that is a path": ("flickr30k", table(FLICKR, karpathy("../../x", "good.png")), "cannot be called '../../x"),
  "a split that is none": ("flickr30k", table(FLICKR, karpathy(3, "good.png")), "not of the form of Karp.*: .*split 3"),
  "images outside": (
    "flickr30k",
    table(FLICKR, karpathy("test", "good.png", "../outside/secret.png")),
    {OUTSIDE: 1},
  ),
}


@pytest.fixture
def within_seconds():
  """Fail where a pipe is opened, which takes for ever."""
  before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it takes for ever"))
  signal.alarm(60)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", FAULTS)
def test_a_folder_with_a_fault(tmp_path, within_seconds, name):
  reader, write_raw, expected = FAULTS[name]
  raw = tmp_path / "raw"
  raw.mkdir()
  for ending, secret in (("png", picture(99)), ("txt", b"a secret")):
    put(tmp_path / "outside" / f"secret.{ending}", secret)
  write_raw(raw)
  reader, _, below = reader.partition(" ")
  find, data_set = prepare_data.DATA_SETS[reader]
  if reader == "files":
    find = functools.partial(own.find_parts, asked=Asked(held_out=0.0))
  if isinstance(expected, str):
    with pytest.raises(UserError, match=expected) as error:
      write.prepare(find(raw / below), tmp_path / "out", data_set=data_set)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
  else:
    ((split, report),) = write.prepare(find(raw / below), tmp_path / "out", data_set=data_set).items()
    assert report.skipped == expected and report.pairs >= 1
    stored = load(tmp_path / "out", split)
    assert picture(99) not in [record["image"] for record in stored]
    assert "a secret" not in [record["caption"] for record in stored]
  assert {path.name for path in tmp_path.iterdir()} <= {"raw", "outside", "out"}
