"""Test files that change while they are read: preparation stops, and training counts the unreadable records."""

from __future__ import annotations

import os
import pathlib

import pytest

from diffdis_jax.data import records, sources
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.errors import UserError
from tests.raw_pairs import load, write_pairs

pytestmark = pytest.mark.slow


def shorten(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 3)


def reverse(path: pathlib.Path) -> None:
  path.write_bytes(bytes(reversed(path.read_bytes())))


def replace(path: pathlib.Path) -> None:
  path.with_name("new").write_bytes(path.read_bytes())
  path.with_name("new").replace(path)


CHANGES = [shorten, reverse, replace]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tar_that_changes_while_it_is_read_stops_the_preparation(tmp_path, monkeypatch, change):
  """Nothing of the tar is stored. Once it is whole again, the same command resumes."""
  write_pairs(tmp_path / "raw", 200)
  whole = (tmp_path / "raw" / "0.tar").read_bytes()
  to_record = parts.to_record
  with monkeypatch.context() as patch:
    reads_left = [50]

    def changing(*args, **how):
      reads_left[0] -= 1
      if not reads_left[0]:
        change(tmp_path / "raw" / "0.tar")
      return to_record(*args, **how)

    patch.setattr(parts, "to_record", changing)
    with pytest.raises(UserError, match="0.tar changed while it was read; run the same command again when it is whole"):
      prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  assert not (tmp_path / "out").exists()
  (tmp_path / "raw" / "0.tar").write_bytes(whole)
  assert prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")["train"].pairs == 200


@pytest.mark.parametrize("change", CHANGES)
def test_records_of_shards_that_change_in_training_are_counted(tmp_path, change):
  """A record that is read is correct; the others count as unreadable."""
  write_pairs(tmp_path / "raw", 99, size=(40, 40))
  prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  images = [record["image"] for record in load(tmp_path / "out", "train")]
  source = sources.open_source(name="pairs", path=tmp_path / "out", split="train", image_size=8)
  assert source[0]["image"] == images[0]
  change(next((tmp_path / "out").glob("*.array_record*")))
  counts: dict[str, int] = {}
  for i, image in enumerate(images):
    try:
      assert source[i]["image"] == image
      reason = ""
    except records.Unusable as error:
      reason = str(error)
    counts[reason] = counts.get(reason, 0) + 1
  assert counts.keys() <= {"", "unreadable record"}
  assert counts.get("unreadable record", 0) >= (0 if change is replace else 50)
