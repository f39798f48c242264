"""Files that change while they are read: a preparation stops, and training counts what it cannot read."""

from __future__ import annotations

import os
import pathlib

import pytest

from diffdis_jax.data import records, sources
from diffdis_jax.data.prepare import pairs, parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.errors import UserError
from tests.raw_pairs import load, write_pairs

pytestmark = pytest.mark.slow


def shorter(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 3)


def other(path: pathlib.Path) -> None:
  path.write_bytes(bytes(reversed(path.read_bytes())))


def replaced(path: pathlib.Path) -> None:
  path.with_name("new").write_bytes(path.read_bytes())
  path.with_name("new").replace(path)


CHANGES = [shorter, other, replaced]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tar_that_changes_while_it_is_read(tmp_path, monkeypatch, change):
  """It is not stored. When it is whole again, the same command resumes."""
  write_pairs(tmp_path / "raw", 200)
  whole = (tmp_path / "raw" / "0.tar").read_bytes()
  to_record = pairs.to_record
  with monkeypatch.context() as patch:
    left = [50]

    def changing(*args, **how):
      left[0] -= 1
      if not left[0]:
        change(tmp_path / "raw" / "0.tar")
      return to_record(*args, **how)

    patch.setattr(pairs, "to_record", changing)
    with pytest.raises(UserError, match="0.tar changed while it was read; run the same command again when it is whole"):
      prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  assert not (tmp_path / "out").exists()
  (tmp_path / "raw" / "0.tar").write_bytes(whole)
  assert prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")["train"].pairs == 200


@pytest.mark.parametrize("change", CHANGES)
def test_shards_that_change_in_training(tmp_path, change):
  """Records that cannot be read are counted as such."""
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
  assert counts.get("unreadable record", 0) >= (0 if change is replaced else 50)
