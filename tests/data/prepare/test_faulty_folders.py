"""Each fault of a downloaded folder is one line, or its pairs are skipped and counted."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from diffdis_jax import prepare_data
from diffdis_jax.data.prepare import own, write
from diffdis_jax.data.prepare.tables import Asked
from diffdis_jax.errors import UserError
from tests.raw_pairs import picture, put

Write = Callable[[pathlib.Path], object]


def beside_a_pair(*names: str, how: Write) -> Write:
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
  """Make a table beside a good picture."""
  return lambda raw: (put(raw / "good.png", picture(0)), put(raw / name, text))


def karpathy(split: Any, *files: str) -> str:
  images = [{"split": split, "filename": file, "imgid": i, "sentences": [{"raw": "x"}]} for i, file in enumerate(files)]
  return json.dumps({"images": images})


FLICKR = "dataset_flickr30k.json"
# Name -> reader of prepare_data, what writes the folder, and the error's message or the pairs that are skipped.
FAULTS: dict[str, tuple[str, Write, str | dict[str, int]]] = {
  "an empty tar": ("pairs", lambda raw: put(raw / "0.tar", b""), "no usable pair in split train: no pairs in it"),
  "links within": ("files", beside_a_pair("a.png", "b.txt", how=lambda p: p.symlink_to("good" + p.suffix)), {}),
  "links to nothing": ("files", beside_a_pair("a.png", how=lambda p: p.symlink_to("no.png")), {"missing image": 1}),
  "a hub's cache": ("files snapshots/r", hub_cache, {}),
  "a split that is a path": ("flickr30k", table(FLICKR, karpathy("../../x", "good.png")), "cannot be called '../../x"),
  "a split that is none": ("flickr30k", table(FLICKR, karpathy(3, "good.png")), "not of the form of Karp.*: .*split 3"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_folder_with_a_fault(tmp_path, name):
  reader, write_raw, expected = FAULTS[name]
  raw = tmp_path / "raw"
  raw.mkdir()
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
    (report,) = write.prepare(find(raw / below), tmp_path / "out", data_set=data_set).values()
    assert report.skipped == expected and report.pairs >= 1
  assert {path.name for path in tmp_path.iterdir()} <= {"raw", "out"}
