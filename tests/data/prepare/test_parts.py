import dataclasses
import pathlib
import tarfile

import pytest

from diffdis_jax.data import records
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.pairs import RawPair, to_record
from diffdis_jax.data.prepare.parts import TarPart
from diffdis_jax.errors import UserError
from tests import raw_pairs


def write_tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  raw_pairs.write_tar(path, files)
  return path


def read(path: pathlib.Path) -> tuple[list[RawPair], bool]:
  """Its pairs, without the tar's name before their keys; and whether it is cut off."""
  part = TarPart(path, "train")
  pairs = list(part)
  assert all(pair.key.startswith(f"{path.stem}/") for pair in pairs)
  return [dataclasses.replace(pair, key=pair.key.removeprefix(f"{path.stem}/")) for pair in pairs], part.truncated


FILES = {"a.png": b"A" * 700, "a.txt": b"one", "a.json": b"{}", "b.png": b"B" * 700, "b.txt": b"two"}
PAIRS = [RawPair("a", b"A" * 700, b"one", b"{}"), RawPair("b", b"B" * 700, b"two")]


def test_groups_by_key(tmp_path):
  assert read(write_tar(tmp_path / "0.tar", FILES)) == (PAIRS, False)


def test_extensions_keys_and_strangers(tmp_path):
  files = {"sub/x.JPG": b"1", "sub/x.txt": b"t", "sub/x.cls": b"9", "y.seg.png": b"no", "README": b""}
  files |= {"y.webp": b"2", "z.jpeg": b"3"}
  files |= {"sub/._x.jpg": b"of macOS", "sub/more": b""}
  path = write_tar(tmp_path / "0.tar", files)
  part = TarPart(path, "train")
  named = [RawPair("sub/x", b"1", b"t"), RawPair("y.seg", b"no"), RawPair("y", b"2"), RawPair("z", b"3")]
  assert [dataclasses.replace(pair, key=pair.key.removeprefix("0/")) for pair in part] == named


def test_names_with_dots_keep_their_pairs(tmp_path):
  names = ["photo.2020", "a.b.c", "v1.5/x", "v1.5/y.z", "plain", "trailing.", "2020.01.02", "x.png"]
  files = {f"{name}.{ending}": f"{name} {ending}".encode() for name in names for ending in ("png", "txt")}
  pairs, _ = read(write_tar(tmp_path / "0.tar", files))
  assert pairs == [RawPair(name, f"{name} png".encode(), f"{name} txt".encode()) for name in names]


@pytest.mark.parametrize(
  ("length", "expected"),
  [
    (0, []),  # nothing
    (300, []),  # in the first header
    (512 + 100, []),  # in a's image
    (512 + 1024, []),  # after a's image
    (2560 + 100, [PAIRS[0]]),  # in the header of a.json: a has image and caption, and may have had a json
    (3584 + 512 + 100, [PAIRS[0]]),  # in b's image
    (3584 + 1536, [PAIRS[0]]),  # after b's image
    (3584 + 1536 + 513, [PAIRS[0]]),  # in b's caption
    (3584 + 1536 + 1024, PAIRS),  # only the end mark is missing
  ],
)
def test_truncated_end(tmp_path, length, expected):
  path = write_tar(tmp_path / "0.tar", FILES)
  path.write_bytes(path.read_bytes()[:length])
  pairs, truncated = read(path)
  assert truncated
  assert [(p.key, p.image, p.caption) for p in pairs] == [(p.key, p.image, p.caption) for p in expected]


def test_files_that_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(parts, "MOST_TEXT_BYTES", 1000)
  files = {"a.jpg": b"1", "a.txt": bytes(1001), "b.jpg": bytes(1001), "b.txt": b"2", "c.jpg": b"3", "c.txt": b"4"}
  path = write_tar(tmp_path / "0.tar", files)
  with tarfile.open(path, "a") as tar:
    link = tarfile.TarInfo("c.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
  pairs, truncated = read(path)
  assert [pair.refused for pair in pairs] == [records.TOO_LARGE, "", records.NOT_PLAIN] and not truncated
  with pytest.raises(records.Unusable, match=records.TOO_LARGE):
    to_record(pairs[0])


def test_a_key_twice(tmp_path):
  path = write_tar(tmp_path / "0.tar", FILES)
  with tarfile.open(path, "a") as tar:
    tar.addfile(tarfile.TarInfo("a.jpeg"))
  with pytest.raises(UserError, match=r"0.tar has two files for image of 'a', the second of them 'a.jpeg'"):
    read(path)


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("train-00000.tar", "train"),
    ("val_vendor-00012.tar", "val_vendor"),
    ("00000.tar", "train"),
    ("cc3m-validation-0003.tar", "validation"),
    ("test-00001-of-00010.tar", "test"),
    ("pictures.tar", None),
    ("train.tar", None),
  ],
)
def test_split_of_a_tar(tmp_path, name, split):
  write_tar(tmp_path / name, FILES)
  if split:
    assert [part.split for part in parts.tars(tmp_path)] == [split]
  else:
    with pytest.raises(UserError, match="cannot tell the split of"):
      parts.tars(tmp_path)
