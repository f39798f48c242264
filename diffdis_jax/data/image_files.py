"""Opening encoded images: in the field's formats alone, and within a bound of pixels. Nothing else calls Image.open.

Pillow reads forty formats, one of them by running Ghostscript; each is code that a downloaded file reaches.
"""

from __future__ import annotations

import io
import re

from PIL import Image, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

# torchvision's ImageFolder's, and GIF. JPEG includes MPO, a JPEG with a second picture that some cameras write.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "heic", "heif"})
MAX_PIXELS = 2**26  # 67 million, 8192 x 8192: the largest photographs of ImageNet have 61
MAX_SIDE = 2**16 - 1  # pixels, the most that a JPEG can have
MAX_SCANS = 100  # of a JPEG, each of which costs as much as a whole picture; encoders write about ten
_SCAN = b"\xff\xda"
# A marker, whatever stands before it: 00 and FF are no markers, and 01 and D0 to D8 have no length behind them.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")


TOO_MANY_PIXELS = "image of too many pixels"
TOO_MANY_SCANS = f"JPEG of more than {MAX_SCANS} scans"
NO_HEIC = "HEIC image, which needs pip install 'diffdis_jax[heic]'"


class Unusable(ValueError):
  """A pair or record that cannot be used. Its message is the reason by which it is counted."""


def open_image(data: bytes) -> Image.Image:
  """Open the image of encoded bytes, of which only the header is read so far.

  Raises:
    Unusable: more pixels than MAX_PIXELS, a side longer than MAX_SIDE, a JPEG of more than MAX_SCANS, or a HEIC image
      that nothing installed reads.
    Exception: no image in one of FORMATS, AVIF or HEIC; Pillow's readers raise whatever a broken file leads them into.
  """
  image = Image.open(io.BytesIO(data), formats=_phone_formats(data) if is_of_a_phone(data) else FORMATS)
  sizes = [image.size]
  if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose tiles are decoded whole, even where it is smaller
    sizes.append((image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0)))
  for width, height in sizes:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
      raise Unusable(TOO_MANY_PIXELS)
  if isinstance(image, JpegImageFile) and _has_too_many_scans(data):
    raise Unusable(TOO_MANY_SCANS)
  return image


def is_of_a_phone(data: bytes) -> bool:
  """Say whether these bytes begin an AVIF or HEIC image, or a film of the same container."""
  return data[4:8] == b"ftyp"


def _phone_formats(data: bytes) -> tuple[str, ...]:
  if data[8:12] in (b"avif", b"avis"):
    return ("AVIF",)
  try:
    import pillow_heif
  except ImportError as error:
    raise Unusable(NO_HEIC) from error
  pillow_heif.register_heif_opener()
  return ("HEIF",)


def _has_too_many_scans(data: bytes) -> bool:
  """Walk a JPEG's segments to its end mark, as libjpeg does, and say whether more than MAX_SCANS of them begin a scan.

  The bytes FF DA alone do not show it: a thumbnail, a profile, or the film that a phone puts behind its picture have
  them by chance.
  """
  if data.count(_SCAN) <= MAX_SCANS:
    return False
  position, scans = 2, 0
  while scans <= MAX_SCANS and (marker := _MARKER.search(data, position)) and marker[1] != b"\xd9":
    scans += marker[1] == b"\xda"
    # Behind a scan's header are its pixels, in which FF is followed by 00 or by a marker.
    position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
  return scans > MAX_SCANS


def png(image: Image.Image) -> bytes:
  """Encode an image without loss."""
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()
