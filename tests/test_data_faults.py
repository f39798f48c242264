"""One record in a hundred is spoiled in each way, all at once: preparation and training count them and continue."""

from __future__ import annotations

import os
import pathlib

import pytest
from absl import logging

from diffdis_jax.data import records, sources
from diffdis_jax.data.loader import SUBSTITUTED, Substitutions
from diffdis_jax.data.prepare import pairs, parts
from diffdis_jax.data.prepare.write import Stage, prepare, serializer
from diffdis_jax.errors import UserError
from tests import steps, tiny
from tests.raw_pairs import faults, load, picture, write_tar

pytestmark = pytest.mark.slow

FAULTS = faults()
N = 300
SHARE = 100  # a fault of each kind in so many


def raw_pairs():
  """Image, caption and the fault's name or ""; three of each fault."""
  kinds = sorted(FAULTS)
  for i in range(N):
    name = kinds[i % SHARE] if i % SHARE < len(kinds) else ""
    image, caption, _ = FAULTS[name] if name else (picture(i, "JPEG", (20, 18)), f"good {i}".encode(), "")
    yield image, caption, name


EXPECTED = {}
for _, _, reason in FAULTS.values():
  if reason:
    EXPECTED[reason] = EXPECTED.get(reason, 0) + N // SHARE


@pytest.mark.parametrize("cut", [False, True])
def test_preparation(tmp_path, cut):
  (tmp_path / "raw").mkdir()
  content = {}
  for i, (image, caption, _) in enumerate(raw_pairs()):
    content |= {f"{i:04d}.jpg": image, f"{i:04d}.txt": caption}
  write_tar(tmp_path / "raw" / "0.tar", content)
  if cut:
    whole = (tmp_path / "raw" / "0.tar").read_bytes()
    (tmp_path / "raw" / "0.tar").write_bytes(whole[: len(whole) * 2 // 3])
  report = prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")["train"]
  stored = load(tmp_path / "out", "train")
  assert len(stored) == report.pairs
  if cut:
    assert report.truncated == ["0"] and 0 < report.pairs < N - sum(EXPECTED.values())
    return
  assert report.skipped == EXPECTED and report.pairs == N - sum(EXPECTED.values())
  assert report.changed == {pairs.CONTROLS: 3, pairs.LONG: 3}
  assert all(record["caption"].isprintable() and len(record["caption"]) <= pairs.MAX_CAPTION for record in stored)


@pytest.fixture
def spoiled(tmp_path):
  """A data set that was prepared without any check."""

  class Unchecked(Stage):
    def serialized(self, part, report):
      serialize = serializer(self.features())
      for i, (image, caption, _) in enumerate(raw_pairs()):
        report.pairs += 1
        yield serialize({"image": image, "caption": caption, "key": f"{i}", "metadata": "{}"})

  (tmp_path / "raw").mkdir()
  write_tar(tmp_path / "raw" / "0.tar", {"0.png": picture(0), "0.txt": b"x"})
  prepare(parts.tars(tmp_path / "raw"), tmp_path / "out", make_stage=Unchecked)
  return tmp_path / "out"


def test_training_counts_each_reason_and_uses_what_can_be_used(spoiled, caplog):
  config = tiny.get_config()
  config.batch_size = 50
  config.data.update(name="pairs", path=str(spoiled))
  iterator, substitutions = steps.open_batches(config), Substitutions()
  epochs = 2
  for _ in range(epochs * N // 50):
    batch = next(iterator)
    assert batch["image"].shape == (50, 16, 16, 3) and (batch["tokens"][:, 1] != 49407).all()
    assert SUBSTITUTED not in substitutions.take(batch)
  with caplog.at_level(logging.WARNING):
    count = substitutions.report()[SUBSTITUTED]
  reasons = {r: int(n) for r, n in zip(records.REASONS, substitutions.total, strict=True) if n}
  assert reasons.keys() == EXPECTED.keys() and count == sum(reasons.values())
  # Faults that lie side by side are met more than once each: by their own row and by the rows before.
  assert all(n >= epochs * EXPECTED[reason] for reason, n in reasons.items())
  assert all(f"{n} {reason}" in caplog.text for reason, n in reasons.items())
  assert substitutions.report() == {SUBSTITUTED: 0}


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
  """Nothing of it is stored; when it is whole again, the same command goes on."""
  (tmp_path / "raw").mkdir()
  content = {f"{i}.{ending}": picture(i) if ending == "png" else b"x" for i in range(200) for ending in ("png", "txt")}
  write_tar(tmp_path / "raw" / "0.tar", content)
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
  (tmp_path / "raw").mkdir()
  content = {f"{i}.png": picture(i, size=(40, 40)) for i in range(99)} | {f"{i}.txt": b"x" for i in range(99)}
  write_tar(tmp_path / "raw" / "0.tar", content)
  prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  images = [record["image"] for record in load(tmp_path / "out", "train")]
  source = sources.open_source(name="pairs", path=tmp_path / "out", split="train", image_size=8)
  assert source[0]["image"] == images[0]
  change(next((tmp_path / "out").glob("*.array_record*")))
  found: dict[str, int] = {}
  for i, image in enumerate(images):
    try:
      assert source[i]["image"] == image
      reason = ""
    except records.Unusable as error:
      reason = str(error)
    found[reason] = found.get(reason, 0) + 1
  assert found.keys() <= {"", "unreadable record"}
  assert found.get("unreadable record", 0) >= (0 if change is replaced else 50)
