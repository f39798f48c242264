"""Make raw pairs for the tests of data: pictures, webdataset tars, and pairs with every kind of fault."""

from __future__ import annotations

import io
import pathlib
import struct
import tarfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from diffdis_jax.data import sources


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
  return encode(Image.fromarray(pixels), kind)


def put(path: pathlib.Path, content: bytes | str) -> None:
  """Write a file, and its folder if there is none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())


def columns(**values: Any) -> bytes:
  """Return the bytes of a parquet file with these columns."""
  file = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(pyarrow.table(values), file, row_group_size=7)
  return file.getvalue().to_pybytes()


def write_pairs(folder: pathlib.Path, count: int, *, first: int = 0, tar: str = "0.tar", **how: Any) -> None:
  """Write a tar of pictures into a folder. A picture's caption is its number."""
  folder.mkdir(parents=True, exist_ok=True)
  numbers = range(first, first + count)
  files_of = lambda i: {f"{i:03d}.png": picture(i, **how), f"{i:03d}.txt": b"%d" % i}
  files = {name: data for i in numbers for name, data in files_of(i).items()}
  write_tar(folder / tar, files)


def write_tar(path: pathlib.Path, files: Mapping[str, bytes]) -> None:
  with tarfile.open(path, "w") as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


def load(folder: pathlib.Path, split: str) -> list[dict[str, Any]]:
  source = sources.open_source(name="pairs", path=folder, split=split, image_size=8)
  return [source[i] for i in range(len(source))]


def bomb() -> bytes:
  """Make a PNG whose header says 100,000 x 100,000 pixels."""
  chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def faults() -> dict[str, tuple[bytes, bytes, str]]:
  """Return, by the name of a fault, an image, a caption, and the reason for leaving the pair out ("" if it can be
  used)."""
  red = Image.new("RGB", (16, 16), (255, 0, 0))
  exif = Image.Exif()
  exif[0x0112] = 6
  palette = Image.new("P", (16, 16))
  palette.putpalette([255, 0, 0, 0, 0, 255])
  good = picture(0, "JPEG", (16, 16))
  grey = Image.fromarray(np.full((16, 16), 65535, np.uint16))
  animated = encode(red, "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16), (0, 0, 255))])
  return {
    "truncated": (good[: len(good) // 2], b"x", "corrupt image"),
    "zero bytes": (b"", b"x", "missing image"),
    "no image": (b"<html>404</html>", b"x", "corrupt image"),
    "bomb": (bomb(), b"x", "image of too many pixels"),
    "CMYK": (encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), b"x", ""),
    "16 bit": (encode(grey), b"x", ""),
    "palette": (encode(palette, transparency=1), b"x", ""),
    "animated": (animated, b"x", ""),
    "EXIF": (encode(Image.new("RGB", (16, 24), (255, 0, 0)), "JPEG", exif=exif), b"x", ""),
    "one pixel": (encode(Image.new("RGB", (1, 1))), b"x", "image of one pixel's width"),
    "empty caption": (good, b" \n", "missing caption"),
    "long caption": (good, b"word " * 2000, ""),
    "control characters": (good, b"a\x00b\x1b[31m", ""),
    "not UTF-8": (good, b"\xff\xfe\xc3", "caption that is not UTF-8"),
  }
