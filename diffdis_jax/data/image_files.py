"""Opening encoded images: in the field's formats alone, and within a bound of pixels. Nothing else calls Image.open.

Pillow reads forty formats, one of them by running Ghostscript; each is code that a downloaded file reaches.
"""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

# torchvision's ImageFolder's, and GIF. JPEG includes MPO, a JPEG with a second picture that some cameras write.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"})  # of their files
MAX_PIXELS = 2**26  # 67 million, 8192 x 8192: the largest photographs of ImageNet have 61
MAX_SIDE = 2**16 - 1  # pixels, the most that a JPEG can have


def open_image(data: bytes) -> Image.Image:
  """The image of encoded bytes, of which only the header is read so far.

  Raises:
    Image.DecompressionBombError: more pixels than MAX_PIXELS, or a side longer than MAX_SIDE.
    Exception: no image in one of FORMATS; Pillow's readers raise whatever a broken file leads them into.
  """
  image = Image.open(io.BytesIO(data), formats=FORMATS)
  for width, height in (image.size, _tile(image)):
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
      raise Image.DecompressionBombError(f"{width} x {height} pixels")
  return image


def png(image: Image.Image) -> bytes:
  """The image's file, without loss."""
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()


class _Tile(NamedTuple):
  width: int
  height: int


def _tile(image: Image.Image) -> _Tile:
  """Of a TIFF's tiles, each of which is decoded whole, even where the image is smaller."""
  if not isinstance(image, TiffImagePlugin.TiffImageFile):
    return _Tile(0, 0)
  return _Tile(image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0))
