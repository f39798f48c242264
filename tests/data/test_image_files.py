"""Test that only images of common formats and of bounded size are opened."""

from __future__ import annotations

import functools
import io
import struct
import sys
import time
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import EpsImagePlugin, Image

from diffdis_jax.data import image_files, records
from diffdis_jax.data.prepare import pairs
from tests import studio_pictures
from tests.raw_pairs import encode

RED = Image.new("RGB", (16, 16), (255, 0, 0))
SIDE = 8192


def tiff_with_tiles(width: int, height: int) -> bytes:
  """Make a TIFF of 16 x 16 pixels that claims tiles of this size and holds 1000 bytes of them."""
  data = zlib.compress(bytes(1000))
  fields = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 134, 325: len(data)}
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
  return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + data


@pytest.mark.parametrize("kind", [*image_files.FORMATS, "MPO"])
def test_common_formats_are_read(kind):
  options = {"save_all": True, "append_images": [RED]} if kind == "MPO" else {}
  np.testing.assert_allclose(
    np.asarray(records.read_image(encode(RED, kind, **options)).image)[8, 8], (255, 0, 0), atol=3
  )


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_a_phones_pictures_become_jpegs(kind, monkeypatch):
  pillow_heif.register_heif_opener()  # it also enables writing
  data = encode(RED, kind)
  np.testing.assert_allclose(np.asarray(records.read_image(data).image)[8, 8], (255, 0, 0), atol=3)
  record, changed = pairs.to_record(pairs.RawPair("0", image=data, caption=b"red"))
  assert Image.open(io.BytesIO(record["image"])).format == "JPEG" and changed == ["AVIF or HEIC stored as JPEG"]
  np.testing.assert_allclose(np.asarray(records.read_image(record["image"]).image), np.asarray(RED), atol=3)
  with pytest.raises(records.Unusable, match="corrupt image"):
    records.read_image(data[:-20])
  monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
  if kind == "HEIF":
    with pytest.raises(records.Unusable, match=r"needs pip install 'diffdis_jax\[heic\]'"):
      records.read_image(data)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "IM"])
def test_other_formats_are_refused_without_decoding(kind, monkeypatch):
  data = encode(RED, kind)
  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was called"))
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
def test_too_many_pixels_are_refused_from_the_header_alone(data, monkeypatch):
  monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the image was decoded"))
  for read in (records.read_image, records.read_header):
    with pytest.raises(records.Unusable, match="image of too many pixels"):
      read(data)


def test_a_jpeg_of_many_scans_is_refused_at_once():
  """A scan costs as much as an image, so a file of 300 kB could take a minute. Bytes after the image do not count."""
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  data = encode(Image.fromarray(noise), "JPEG", progressive=True)
  last_scan = data[data.rindex(b"\xff\xda") : -2]
  for read in (records.read_image, records.read_header, functools.partial(records.read_image, at_least=8)):
    start = time.monotonic()
    with pytest.raises(records.Unusable, match="JPEG of more than 100 scans"):
      read(data[:-2] + 3000 * last_scan + data[-2:])
    assert time.monotonic() - start < 0.1
  np.testing.assert_array_equal(
    np.asarray(records.read_image(data + 3000 * last_scan).image), np.asarray(records.read_image(data).image)
  )
