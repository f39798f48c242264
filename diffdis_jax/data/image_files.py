"""Opening encoded images, in the field's formats alone, and within a bound of pixels. Pillow reads forty formats, one
of them by running Ghostscript; each is code that a downloaded file reaches."""

from __future__ import annotations

import io

from PIL import Image

# torchvision's ImageFolder's, and GIF. JPEG includes MPO, a JPEG with a second picture that some cameras write.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "heic", "heif"})
MAX_PIXELS = 2**26  # 67 million, 8192 x 8192: the largest photographs of ImageNet have 61
MAX_SIDE = 2**16 - 1  # pixels, the most that a JPEG can have

TOO_MANY_PIXELS = "image of too many pixels"
NO_HEIC = "HEIC image, which needs pip install 'diffdis_jax[heic]'"


class Unusable(ValueError):
  """A pair or record that cannot be used. Its message is the reason by which it is counted."""


def open_image(data: bytes) -> Image.Image:
  """Open the image of encoded bytes, of which only the header is read so far.

  Raises Unusable: too many pixels, or HEIC, which nothing installed reads. For no image in one of FORMATS, AVIF or HEIC
  Pillow's readers raise whatever a broken file leads them into.
  """
  formats = FORMATS
  if is_of_a_phone(data) and data[8:12] in (b"avif", b"avis"):
    formats = ("AVIF",)
  elif is_of_a_phone(data):
    try:
      import pillow_heif
    except ImportError as error:
      raise Unusable(NO_HEIC) from error
    pillow_heif.register_heif_opener()
    formats = ("HEIF",)
  image = Image.open(io.BytesIO(data), formats=formats)
  if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
    raise Unusable(TOO_MANY_PIXELS)
  return image


def is_of_a_phone(data: bytes) -> bool:
  """Say whether these bytes begin an AVIF or HEIC image, or a film of the same container."""
  return data[4:8] == b"ftyp"


def png(image: Image.Image) -> bytes:
  """Encode an image without loss."""
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()
