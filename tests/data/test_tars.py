"""Test that tars of pairs are read in any order of members, and up to the first damage."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import tarfile

import pytest

from diffdis_jax.data import tars
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.parts import RawPair, TarPart
from diffdis_jax.errors import UserError
from tests.raw_pairs import write_tar

FILES = {"a.png": b"A" * 700, "a.txt": b"one", "a.json": b"{}", "b.png": b"B" * 700, "b.txt": b"two"}
PAIRS = [RawPair("a", b"A" * 700, b"one", b"{}"), RawPair("b", b"B" * 700, b"two")]


def read(path: pathlib.Path) -> list[RawPair]:
  """Read the pairs of an undamaged tar, and remove the tar's name from their keys."""
  part = TarPart(path, "train")
  pairs = [dataclasses.replace(pair, key=pair.key.removeprefix(f"{path.stem}/")) for pair in part]
  assert not part.truncated
  return pairs


@pytest.mark.parametrize("seed", range(5))
def test_members_in_any_order(tmp_path, seed):
  keys = ["0", "1", "b/0", "b/1", "photo.2020", "a.b.c", "v1.5/y.z", "trailing.", "2020.01.02", "x.png"]
  files = {f"{key}.{ending}": f"{key} {ending}".encode() for key in keys for ending in ("png", "txt")}
  files |= {"README": b"", "b/._0.png": b"of macOS", "0.cls": b"9"}
  names = random.Random(seed).sample(sorted(files), len(files))
  write_tar(tmp_path / "0.tar", {name: files[name] for name in names})
  pairs = read(tmp_path / "0.tar")
  assert [pair.key for pair in pairs] == list(dict.fromkeys(n[:-4] for n in names if n[:-4] in keys and n != "0.cls"))
  assert all((pair.image, pair.caption) == (files[f"{pair.key}.png"], files[f"{pair.key}.txt"]) for pair in pairs)


@pytest.mark.parametrize("second", ["a.jpg", "a.JPG"])
def test_two_files_of_one_field_and_key(tmp_path, second):
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    for name in ("a.jpg", "a.txt", "b.jpg", second):
      tar.addfile(tarfile.TarInfo(name))
  with pytest.raises(UserError, match=rf"0.tar has two files for image of 'a', the second of them '{second}'; pack"):
    read(tmp_path / "0.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_passed_over(tmp_path, kind):
  write_tar(tmp_path / "0.tar", {"a.txt": b"1", "b.jpg": b"2", "b.txt": b"2"})
  with tarfile.open(tmp_path / "0.tar", "a") as tar:
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "b.jpg"
    tar.addfile(link)
  assert read(tmp_path / "0.tar") == [RawPair("a", None, b"1"), RawPair("b", b"2", b"2")]


@pytest.mark.parametrize(
  ("length", "expected"),
  [
    (0, []),  # nothing
    (300, []),  # in the first header
    (512 + 100, []),  # in a's image
    (512 + 1024, []),  # after a's image
    (2560 + 100, PAIRS[:1]),  # in the header of a.json: a has an image and a caption
    (3584 + 512 + 100, PAIRS[:1]),  # in b's image
    (3584 + 1536 + 513, PAIRS[:1]),  # in b's caption
    (3584 + 1536 + 1024, PAIRS),  # only the end mark is missing
  ],
)
def test_a_tar_that_is_cut_off(tmp_path, length, expected):
  write_tar(tmp_path / "0.tar", FILES)
  (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:length])
  part = TarPart(tmp_path / "0.tar", "train")
  assert [(p.key, p.image, p.caption) for p in part] == [(f"0/{p.key}", p.image, p.caption) for p in expected]
  assert part.truncated


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
  """Return the header of a tar member whose size field holds these bytes."""
  block = bytearray(tarfile.TarInfo(name).tobuf())
  block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block)


@pytest.mark.parametrize(
  "damaged",
  [
    header("b.jpg", b"77777777777\0"),  # more bytes than the file has
    header("b.jpg", b"\xff" * 11 + b"\xff"),  # a size of -1
    header("b.jpg", b"\xff" * 10 + b"\xfc\x00"),  # a size of -1024, which leads back to the first header
    header("b.jpg", b"77777777777\0", b"x"),  # an extended header of 8 GB
    header("b.jpg", b"\x80" + bytes(3) + b"\x7f" * 8, b"L"),  # a name of 2**62 bytes
    header("b.jpg", b"\x80" + bytes(3) + b"\x7f" * 8, b"S"),
    header("b.jpg", b"00000000000\0", b"L") * 3000,  # 3000 nested long names
    b"?" * 512,
  ],
)
def test_a_damaged_end_ends_the_index_there(tmp_path, damaged):
  write_tar(tmp_path / "0.tar", {"a.jpg": b"A" * 700, "a.txt": b"one"})
  good = (tmp_path / "0.tar").read_bytes()[:2560]
  (tmp_path / "0.tar").write_bytes(good + damaged + b"\1" * 1024)
  index = tars.index(tmp_path / "0.tar", {"jpg": "image", "txt": "caption"}.get)
  assert not index.whole and index.samples["a"]["caption"].read() == b"one"


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("train-00000.tar", "train"),
    ("val_vendor-00012.tar", "val_vendor"),
    ("00000.tar", "train"),
    ("cc3m-validation-0003.tar", "validation"),
    ("test-00001-of-00010.tar", "test"),
    ("train.tar", None),
  ],
)
def test_the_name_of_a_tar_gives_its_split(tmp_path, name, split):
  write_tar(tmp_path / name, FILES)
  if split:
    assert [part.split for part in parts.tars(tmp_path)] == [split]
  else:
    with pytest.raises(UserError, match="cannot tell the split of"):
      parts.tars(tmp_path)
