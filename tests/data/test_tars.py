"""The index of a tar: members in any order, and all that can be wrong with one."""

from __future__ import annotations

import io
import pathlib
import random
import subprocess
import tarfile
import tracemalloc

import pytest

from diffdis_jax.data import tars
from diffdis_jax.data.records import NOT_PLAIN, TOO_LARGE, Unusable
from diffdis_jax.errors import UserError
from tests.raw_pairs import write_tar

ENDINGS = {"jpg": "image", "txt": "caption"}


def read(path: pathlib.Path) -> dict[str, dict[str, bytes]]:
  samples = tars.index(path, ENDINGS.get).samples
  return {key: {field: member.read(10**6) for field, member in sample.items()} for key, sample in samples.items()}


def add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, *, size: int = 0, **fields) -> None:
  member = tarfile.TarInfo(name)
  member.type, member.size = kind, size
  for field, value in fields.items():
    setattr(member, field, value)
  tar.addfile(member, io.BytesIO(bytes(size)))


@pytest.mark.parametrize("seed", range(5))
def test_members_in_any_order(tmp_path, seed):
  keys = [f"{folder}{i}" for folder in ("", "b/") for i in range(4)]
  files = {f"{key}.{ending}": f"{key} {ending}".encode() for key in keys for ending in ENDINGS}
  names = random.Random(seed).sample(sorted(files), len(files))
  write_tar(tmp_path / "0.tar", {name: files[name] for name in names})
  found = read(tmp_path / "0.tar")
  assert list(found) == list(dict.fromkeys(name[:-4] for name in names)) and len(found) == 8
  assert all(found[key] == {ENDINGS[e]: files[f"{key}.{e}"] for e in ENDINGS} for key in found)


@pytest.mark.parametrize("second", ["a.jpg", "a.JPG"])
def test_two_files_of_one_field_and_key(tmp_path, second):
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    for name in ("a.jpg", "a.txt", "b.jpg", second):
      add(tar, name, size=3)
  with pytest.raises(UserError, match=rf"0.tar has two files for image of 'a', the second of them '{second}'; pack"):
    tars.index(tmp_path / "0.tar", ENDINGS.get)


def test_a_sparse_file_is_refused_before_it_is_read(tmp_path):
  with (tmp_path / "a.jpg").open("wb") as file:
    file.truncate(3 * 10**9)
  (tmp_path / "a.txt").write_text("c")
  for kind in ("gnu", "pax"):
    command = ["tar", "--sparse", f"--format={kind}", "-cf", f"{kind}.tar", "a.jpg", "a.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    tracemalloc.start()
    sample = tars.index(tmp_path / f"{kind}.tar", ENDINGS.get).samples["a"]
    with pytest.raises(Unusable, match=NOT_PLAIN):
      sample["image"].read(10**12)
    assert sample["caption"].read(1) == b"c" and tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    add(tar, "b.jpg", size=9)
    add(tar, "a.jpg", kind, linkname="/etc/passwd" if kind == tarfile.SYMTYPE else "b.jpg")
    add(tar, "a.txt", size=9)
  found = tars.index(tmp_path / "0.tar", ENDINGS.get)
  assert found.whole and len(found.samples["a"]["caption"].read(9)) == 9
  with pytest.raises(Unusable, match=NOT_PLAIN):
    found.samples["a"]["image"].read(10**6)


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path):
  write_tar(tmp_path / "0.tar", {"a.jpg": bytes(1000)})
  member = tars.index(tmp_path / "0.tar", ENDINGS.get).samples["a"]["image"]
  assert member.read(1000) == bytes(1000)
  (tmp_path / "0.tar").unlink()
  with pytest.raises(Unusable, match=TOO_LARGE):
    member.read(999)


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
  """A member's, with this field for its size."""
  block = bytearray(tarfile.TarInfo(name).tobuf())
  block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block)


@pytest.mark.parametrize(
  "damaged",
  [
    header("b.jpg", b"77777777777\0"),  # more than is there
    header("b.jpg", b"\xff" * 11 + b"\xff"),  # a size of -1
    header("b.jpg", b"\xff" * 10 + b"\xfc\x00"),  # of -1024, which leads back to the first header
    header("b.jpg", b"\xff" * 10 + b"\xfa\x00"),
    header("b.jpg", b"77777777777\0", b"x"),  # further fields of 8 GB
    header("b.jpg", b"\x80" + bytes(3) + b"\x7f" * 8, b"L"),  # a name of 2**62 bytes
    header("b.jpg", b"\x80" + bytes(3) + b"\x7f" * 8, b"S"),
    header("b.jpg", b"00000000000\0", b"L") * 3000,  # names of names of names
    b"?" * 512,
    b"",
  ],
)
def test_a_damaged_end_ends_the_index_there(tmp_path, damaged):
  write_tar(tmp_path / "0.tar", {"a.jpg": b"A" * 700, "a.txt": b"one"})
  good = (tmp_path / "0.tar").read_bytes()[:2560]
  (tmp_path / "0.tar").write_bytes(good + damaged + b"\1" * 1024)
  found = tars.index(tmp_path / "0.tar", ENDINGS.get)
  assert not found.whole and read(tmp_path / "0.tar") == {"a": {"image": b"A" * 700, "caption": b"one"}}


def test_the_index_takes_little_memory(tmp_path):
  write_tar(tmp_path / "0.tar", {f"{i:05d}.{ending}": b"" for i in range(3000) for ending in ENDINGS})
  tracemalloc.start()
  found = tars.index(tmp_path / "0.tar", ENDINGS.get)
  assert tracemalloc.get_traced_memory()[1] < 3000 * 1000 and len(found.samples) == 3000
  tracemalloc.stop()
