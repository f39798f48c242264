"""Make good and bad uploads for the tests of the app's page."""

from __future__ import annotations

import functools
import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image


def png(width: int, height: int, seed: int = 0) -> bytes:
  """Make a picture of noise."""
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="PNG")
  return buffer.getvalue()


@functools.cache
def bomb(side: int) -> bytes:
  """Make a PNG of a few kilobytes that has side x side pixels of one bit."""
  chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
  packer, row = zlib.compressobj(9), bytes(1 + (side + 7) // 8)
  rows = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write(folder: pathlib.Path, name: str, data: bytes) -> str:
  (folder / name).write_bytes(data)
  return str(folder / name)
