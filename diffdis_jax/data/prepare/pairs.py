"""One raw pair -> a record of a prepared data set, or the reason why it cannot be one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from typing import Any

from PIL import Image

from diffdis_jax.data import image_files
from diffdis_jax.data.records import Unusable, read_caption, read_image, read_metadata
from diffdis_jax.data.transforms import Decoded

MAX_CAPTION = 2000  # characters kept; CLIP reads 77 tokens
JPEG_QUALITY = 92  # of images that are stored smaller; not stated by the paper
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")


@dataclasses.dataclass
class RawPair:
  """The files of one key, as stored. None marks a file that is not there.

  Attributes:
    refused: why one of them was not read, one of records.REASONS; empty where all were.
    file: the name of the file that has the image, where it is still to be read.
    row: the image's row there, if it is a table.
  """

  key: str
  image: bytes | None = None
  caption: bytes | None = None
  metadata: bytes | None = None
  refused: str = ""
  file: str = ""
  row: int = 0


def mend(caption: str) -> str:
  """Return a caption without control characters, which become spaces, and without its end if it is too long. Raises
  Unusable: nothing remains."""
  if not (caption := _CONTROL.sub(" ", caption).strip()[:MAX_CAPTION].rstrip()):
    raise Unusable("missing caption")
  return caption


def shrink(image: Decoded, short_side: int) -> bytes:
  """Return a JPEG of the image with its short side reduced to `short_side` pixels."""
  scale = short_side / min(image.width, image.height)
  width, height = (max(short_side, round(side * scale)) for side in (image.width, image.height))
  file = io.BytesIO()
  small = image.image.resize((width, height), Image.Resampling.BICUBIC, box=(0, 0, *image.sides))
  small.save(file, "JPEG", quality=JPEG_QUALITY)
  return file.getvalue()


def to_record(pair: RawPair, *, short_side: int | None = None) -> dict[str, Any]:
  """Return the fields {image, caption, metadata} of a pair's record. Raises Unusable, with the first reason found.

  Images whose short side is longer than `short_side` are stored as JPEG of that short side. None keeps the bytes of all
  images but AVIF and HEIC, which become JPEG.
  """
  if pair.refused:
    raise Unusable(pair.refused)
  if pair.image is None:
    raise Unusable("missing image")
  caption = mend(read_caption(pair.caption))
  # Read for its errors alone: it is stored as it is, so that no number is written differently.
  read_metadata(pair.metadata)
  # Decoded even where its bytes are kept: what cannot be read in training is left out here, and counted. For errors
  # alone an eighth of the pixels will do: the file is read to its end for any number of them.
  image, data = read_image(pair.image, at_least=short_side or 1), pair.image
  side = min(image.width, image.height)
  if side > (short_side or side) or image_files.is_of_a_phone(data):  # so that training needs no extra
    data = shrink(image, min(side, short_side or side))
  try:
    metadata = (pair.metadata or b"{}").decode()
  except UnicodeDecodeError as error:
    raise Unusable("corrupt json") from error
  return {"image": data, "caption": caption, "metadata": metadata}


def digest(data: bytes) -> bytes:
  """Return 16 bytes that tell an image's content, as downloaded."""
  return hashlib.blake2b(data, digest_size=16).digest()
