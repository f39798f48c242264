"""Which images are opened, and what a decode may take."""

from __future__ import annotations

import functools
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from diffdis_jax.data import image_files, records, transforms
from tests import studio_pictures
from tests.raw_pairs import encode

RED = Image.new("RGB", (16, 16), (255, 0, 0))
SIDE = 8192
MEMORY = 700  # MB that a decode at the limit may take: two copies of four bytes a pixel, and the file
MEASURED = """
import resource, sys
from diffdis_jax.data import records
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
image = records.read_image(open(sys.argv[1], "rb").read())
print(*image.size, image.mode, peak() - before)
"""


def tiff_with_tiles(width: int, height: int) -> bytes:
  """A TIFF of 16 x 16 pixels, in tiles of this size, of which there is a kilobyte."""
  data = zlib.compress(bytes(1000))
  fields = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 134, 325: len(data)}
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
  return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + data


@pytest.mark.parametrize("kind", [*image_files.FORMATS, "MPO"])
def test_formats_of_the_field_are_read(kind):
  options = {"save_all": True, "append_images": [RED]} if kind == "MPO" else {}
  np.testing.assert_allclose(np.asarray(records.read_image(encode(RED, kind, **options)))[8, 8], (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "IM", "AVIF"])
def test_other_formats_are_refused_unread(kind, monkeypatch):
  data = encode(RED, kind)
  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was asked"))
  with pytest.raises(records.Unusable, match="corrupt image"):
    records.read_image(data)
  with pytest.raises(records.Unusable, match="corrupt image"):
    records.read_header(data)


@pytest.mark.parametrize(
  "data",
  [
    studio_pictures.bomb(SIDE + 1),
    studio_pictures.png(2, image_files.MAX_SIDE + 1),
    tiff_with_tiles(32_752, 32_752),
    tiff_with_tiles(image_files.MAX_SIDE + 1, 16),
  ],
)
def test_too_many_pixels_are_told_by_the_header(data, monkeypatch):
  monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
  for read in (records.read_image, records.read_header):
    with pytest.raises(records.Unusable, match="image of too many pixels"):
      read(data)


def of_many_scans(scans: int, size: int) -> bytes:
  """A progressive JPEG whose last scan stands there so often that it has so many; filled up to a size by a comment."""
  data = encode(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG", progressive=True
  )
  last = data[data.rindex(b"\xff\xda") : -2]
  data = data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"
  return with_comments(data, bytes(max(0, size - len(data))))


def with_comments(data: bytes, content: bytes) -> bytes:
  """The JPEG with this content in comments."""
  pieces = [content[start : start + 65_000] for start in range(0, len(content), 65_000)]
  return data[:2] + b"".join(b"\xff\xfe" + struct.pack(">H", len(piece) + 2) + piece for piece in pieces) + data[2:]


def test_a_jpeg_of_many_scans_is_refused_at_once():
  """Each scan costs as much as a picture: 300 kB took a minute."""
  data = of_many_scans(3000, 300_000)
  assert len(data) >= 300_000 and data.count(b"\xff\xda") == 3000
  for read in (records.read_image, records.read_header, functools.partial(records.read_decoded, at_least=8)):
    start = time.monotonic()
    with pytest.raises(records.Unusable, match="JPEG of more than 100 scans"):
      read(data)
    assert time.monotonic() - start < 0.1


def test_only_scans_of_the_picture_itself_count():
  """Not those of a thumbnail, or of bytes that look so in other segments, or behind the picture."""
  few = of_many_scans(image_files.MAX_SCANS, 0)
  data = with_comments(few, b"\xff\xda" * 40_000) + b"\xff\xda" * 1000
  np.testing.assert_array_equal(np.asarray(records.read_image(data)), np.asarray(records.read_image(few)))
  with pytest.raises(records.Unusable, match="scans"):
    records.read_image(of_many_scans(image_files.MAX_SCANS + 1, 0))


def test_text_that_unpacks_to_much_is_a_corrupt_image():
  png = encode(RED)
  chunk = b"zTXta\0\0" + zlib.compress(bytes(20_000_000))
  whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
  with pytest.raises(records.Unusable, match="corrupt image"):
    records.read_image(png[:33] + whole + png[33:])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["1", "RGBA", "I;16"])
def test_memory_of_a_decode_at_the_limit(tmp_path, mode):
  """These took 1.1 to 1.6 GB at 88 million pixels; the file has some kilobytes."""
  options = {"transparency": 0} if mode == "1" else {"compress_level": 1}
  (tmp_path / "large.png").write_bytes(encode(Image.new(mode, (SIDE, SIDE)), **options))
  command = [sys.executable, "-c", MEASURED, str(tmp_path / "large.png")]
  said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
  assert said[:3] == [str(SIDE), str(SIDE), "RGB"] and int(said[3]) < MEMORY


def test_of_an_animation_no_frame_but_the_first_is_decoded(monkeypatch):
  frames = [Image.new("RGB", (64, 64), (k, 0, 0)) for k in range(0, 200, 5)]
  for kind in ("GIF", "WEBP", "PNG"):
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    monkeypatch.setattr(Image.Image, "seek", lambda self, frame: pytest.fail(f"frame {frame}"))
    assert np.asarray(records.read_image(data)).max() <= 2
    monkeypatch.undo()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "I", "F"])
def test_large_images_are_converted_in_strips_to_the_same_pixels(mode, monkeypatch):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (50, 37, 4), np.uint8), "RGBA")
  if mode in ("I;16", "I", "F"):
    image = Image.fromarray(rng.integers(0, 65536, (50, 37)).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode]))
  elif mode != "RGBA":
    image = image.convert(mode)
  data = encode(image, "TIFF" if mode in ("I", "F") else "PNG", **({"transparency": 3} if mode == "P" else {}))
  whole = np.asarray(transforms.decode(data))
  for pixels in (1, 100, 37 * 50 - 1):
    monkeypatch.setattr(transforms, "STRIP", pixels)
    np.testing.assert_array_equal(np.asarray(transforms.decode(data)), whole)
  assert len(np.unique(whole)) > 50
