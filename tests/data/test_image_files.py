"""Test that only images of common formats and of bounded size are opened."""

from __future__ import annotations

import io
import sys

import numpy as np
import pillow_heif
import pytest
from PIL import EpsImagePlugin, Image

from diffdis_jax.data import image_files, records
from diffdis_jax.data.prepare import parts
from tests import studio_pictures
from tests.raw_pairs import encode

RED = Image.new("RGB", (16, 16), (255, 0, 0))
SIDE = 8192


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
  record = parts.to_record(parts.RawPair("0", image=data, caption=b"red"))
  assert Image.open(io.BytesIO(record["image"])).format == "JPEG"
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
  ],
)
def test_too_many_pixels_are_refused_from_the_header_alone(data, monkeypatch):
  monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the image was decoded"))
  for read in (records.read_image, records.read_header):
    with pytest.raises(records.Unusable, match="image of too many pixels"):
      read(data)
