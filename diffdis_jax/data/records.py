"""One raw pair -> a record of a prepared data set, or the reason why it cannot be one. The loader reads records back
through the same checks, so that a reason has one name from the preparation to the training log.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from diffdis_jax.data.transforms import decode
from diffdis_jax.data.webdataset import RawPair

MAX_CAPTION = 2000  # characters kept; CLIP reads 77 tokens
MIN_SIDE = 2  # pixels: dead links are often answered by an image of one pixel
JPEG_QUALITY = 92  # of images that are stored smaller; not stated by the paper
CONTROLS = "caption with control characters"
LONG = f"caption over {MAX_CAPTION} characters"

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")


class Unusable(ValueError):
  """A pair or record that cannot be used. Its message is the reason by which it is counted."""


# Every reason of Unusable. Their order is that of the loader's counts: append, never reorder.
REASONS = (
  "missing image",
  "missing caption",
  "caption that is not UTF-8",
  "corrupt json",
  "json that is no object",
  "corrupt image",
  "image of too many pixels",
  "image of one pixel's width",
  "unreadable record",
)


def read_image(data: bytes | None) -> Image.Image:
  """Encoded bytes -> upright RGB image, decoded to its end; of an animation the first frame.

  Raises:
    Unusable: no bytes, or none that show an image.
  """
  if not data:
    raise Unusable("missing image")
  try:
    image = decode(data)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise Unusable("image of too many pixels") from error
  except Exception as error:  # PIL's readers raise whatever a broken file leads them into
    raise Unusable("corrupt image") from error
  if min(image.size) < MIN_SIDE:
    raise Unusable("image of one pixel's width")
  return image


def read_caption(data: bytes | None) -> str:
  """UTF-8 bytes -> the caption without surrounding white space.

  Raises:
    Unusable: no caption, or bytes that are not UTF-8.
  """
  if data is None or not data.strip():
    raise Unusable("missing caption")
  try:
    return data.decode().strip()
  except UnicodeDecodeError as error:
    raise Unusable("caption that is not UTF-8") from error


def read_metadata(data: bytes | None) -> dict[str, Any]:
  """The json beside an image; empty where there is none.

  Raises:
    Unusable: not JSON, or no object.
  """
  try:
    metadata = json.loads(data or b"{}")
  except (ValueError, RecursionError) as error:
    raise Unusable("corrupt json") from error
  if not isinstance(metadata, dict):
    raise Unusable("json that is no object")
  return metadata


def captions_of(metadata: Mapping[str, Any]) -> list[str]:
  """The several captions of an image, where its metadata has them; else none."""
  captions = metadata.get("captions")
  several = isinstance(captions, list) and len(captions) > 1 and all(isinstance(c, str) and c for c in captions)
  return captions if several else []


def with_captions(record: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
  """The record with the texts in these fields, each a text or a list of texts, for captions.

  Raises:
    Unusable: there is none.
  """
  values = [record.get(field) for field in fields]
  texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
  texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
  if not texts:
    raise Unusable("missing caption")
  return {**record, "caption": texts[0], "captions": texts}


def mend(caption: str) -> tuple[str, list[str]]:
  """A caption as it is stored, and what was changed: control characters become spaces, its end is cut off if too long.

  Raises:
    Unusable: nothing remains.
  """
  changed = []
  if _CONTROL.search(caption):
    caption = _CONTROL.sub(" ", caption).strip()
    changed.append(CONTROLS)
  if len(caption) > MAX_CAPTION:
    caption = caption[:MAX_CAPTION].rstrip()
    changed.append(LONG)
  if not caption:
    raise Unusable("missing caption")
  return caption, changed


def shrink(image: Image.Image, short_side: int) -> bytes:
  """JPEG of the image with its short side reduced to `short_side` pixels."""
  scale = short_side / min(image.size)
  size = tuple(max(short_side, round(side * scale)) for side in image.size)
  file = io.BytesIO()
  image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=JPEG_QUALITY)
  return file.getvalue()


def make(pair: RawPair, *, short_side: int | None = None) -> tuple[dict[str, Any], list[str]]:
  """The record {image, caption, metadata} of a pair, and what was changed in it.

  Args:
    pair: as read.
    short_side: images whose short side is longer are stored as JPEG of this short side; None keeps every image's bytes.

  Raises:
    Unusable: with the first reason found.
  """
  if pair.image is None:
    raise Unusable("missing image")
  caption, changed = mend(read_caption(pair.caption))
  read_metadata(pair.metadata)
  image, data = read_image(pair.image), pair.image
  if short_side is not None and min(image.size) > short_side:
    data = shrink(image, short_side)
    changed.append("image stored smaller")
  try:
    metadata = (pair.metadata or b"{}").decode()
  except UnicodeDecodeError as error:
    raise Unusable("corrupt json") from error
  return {"image": data, "caption": caption, "metadata": metadata}, changed


def digest(data: bytes) -> bytes:
  """16 bytes that tell an image's content, as downloaded."""
  return hashlib.blake2b(data, digest_size=16).digest()
