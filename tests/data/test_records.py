import os
import pathlib
import random
import resource

import pytest

from diffdis_jax import prepare_data
from diffdis_jax.data import records
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.parts import RawPair
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.errors import UserError
from diffdis_jax.run import digests
from tests.raw_pairs import faults, load, picture, write_pairs

FAULTS = faults()


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_has_its_reason(name):
  image, caption, reason = FAULTS[name]
  pair = RawPair("k", image, caption)
  if reason:
    with pytest.raises(records.Unusable, match=f"^{reason}$"):
      parts.to_record(pair)
    assert reason in records.REASONS
  else:
    record = parts.to_record(pair)
    assert record["image"] == image and record["metadata"] == "{}"


def test_captions_are_mended():
  assert parts.mend("a\x00b\x1b[31m") == "a b [31m"
  cut = parts.mend("word " * 2000)
  assert len(cut) <= parts.MAX_CAPTION and cut == ("word " * 400).strip()
  assert parts.mend("tab\tand\nline, ünï") == "tab\tand\nline, ünï"
  with pytest.raises(records.Unusable, match="missing caption"):
    parts.mend("\x00\x01")


@pytest.mark.parametrize(("size", "expected"), [((40, 30), (21, 16)), ((30, 40), (16, 21)), ((17, 500), (16, 471))])
def test_large_images_are_stored_smaller(size, expected):
  record = parts.to_record(RawPair("k", picture(0, size=size), b"x"), short_side=16)
  stored = records.read_image(record["image"]).image
  assert stored.size == expected


def test_a_byte_order_mark_is_no_part_of_the_caption():
  assert records.read_caption(b"\xef\xbb\xbfa red star\r\n") == "a red star"
  with pytest.raises(records.Unusable, match="missing caption"):
    records.read_caption(b"\xef\xbb\xbf\r\n")


FILES = 60


@pytest.fixture
def in_many_files(tmp_path, monkeypatch):
  """Prepare a data set of more files than this process may have open. CC3M's latents are 2,838 files."""
  (tmp_path / "0.png").write_bytes(picture(0))
  items = [parts.file_pair("0.png", f"caption {i}") for i in range(FILES)]
  monkeypatch.setattr(parts, "ITEMS", 1)
  prepare(parts.files(items, split="train", root=tmp_path), tmp_path / "data")
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  # A few other files, such as the data set's description, are open for a moment.
  resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + FILES // 2, hard))
  yield tmp_path / "data"
  resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_records_in_more_files_than_may_be_open_are_all_read(in_many_files):
  """Otherwise the records in unopened files would count as damaged, and others would replace them."""
  source = records.open_pairs(in_many_files, split="train", num_images=None)
  assert [source[i]["caption"] for i in range(FILES)] == [f"caption {i}" for i in range(FILES)]


SMALL = ("dataset_info.json", "features.json", "metadata.json", digests.NAME)


def flip(data: bytes, rng: random.Random) -> bytes:
  """Change one random bit or byte."""
  place = rng.randrange(len(data))
  change = 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
  return data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]


@pytest.mark.parametrize("seed", [pytest.param(0, id="few"), pytest.param(1, marks=pytest.mark.full, id="many")])
def test_a_flip_in_a_small_file_is_refused_in_one_line(tmp_path, seed):
  """An unnoticed flip would change the split or the number of records, or name views that do not exist."""
  for split, count in (("train", 5), ("val", 3)):
    write_pairs(tmp_path / "raw", count, tar=f"{split}-0.tar")
  folder, rng = tmp_path / "data", random.Random(seed)
  write(tmp_path / "raw", folder)
  # The published folder has digests of all the files that are read beside the records.
  whole = {name: (folder / name).read_bytes() for name in SMALL}
  opened = read_splits(folder)
  for _ in range(500 if seed else 40):
    name = rng.choice(SMALL)
    (folder / name).write_bytes(flip(whole[name], rng))
    try:
      assert read_splits(folder) == opened, name
    except UserError as error:
      assert f"{name} holds other bytes than were saved" in str(error) and "\n" not in str(error)
    (folder / name).write_bytes(whole[name])


def write(raw: pathlib.Path, out: pathlib.Path) -> None:
  prepare(parts.tars(raw), out, finish=prepare_data.finish)


def read_splits(folder: pathlib.Path) -> list[object]:
  """Return all that a run reads from a folder."""
  info = records.read_info(folder)
  return [dict(info.metadata), sorted(info.features), {split: load(folder, split) for split in info.splits}]
