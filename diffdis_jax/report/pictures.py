"""Pictures inside a page: made smaller until all of them together take no more than so many bytes."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import functools
import io
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from diffdis_jax.data import image_files

# Longest side, and quality of WebP, from the finest on.
SIZES = ((1600, 85), (1280, 80), (1024, 72), (832, 62), (704, 52), (576, 44), (448, 38), (352, 34), (256, 30))
TRIED = 5  # pictures by whose bytes the finest is chosen that should fit
MARGIN = 0.85  # of the bytes that there are, since the others differ


@dataclasses.dataclass(frozen=True)
class Picture:
  """WebP as a data URI, and its size in pixels."""

  uri: str
  width: int
  height: int


def embed(paths: Sequence[epath.Path], *, most_bytes: int) -> list[Picture | None]:
  """Return each file as a picture, all at one longest side and quality; None for a file that is no picture, or not yet.

  Args:
    most_bytes: of all data URIs together. At the coarsest of SIZES it may be more.
  """
  if not paths:
    return []
  tried = {*np.linspace(0, len(paths) - 1, TRIED).astype(int)}
  few = [image for i in tried if (image := _open(paths[i]))]
  share = MARGIN * most_bytes * max(1, len(few)) / len(paths)
  total = lambda size: sum(len(_shrink(image, *size).uri) for image in few)
  finest = next((i for i, size in enumerate(SIZES) if total(size) < share), len(SIZES) - 1)
  found: list[Picture | None] = []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for side, quality in SIZES[finest:]:
      found = list(pool.map(functools.partial(_embed, side=side, quality=quality), paths))
      if sum(len(picture.uri) for picture in found if picture) <= most_bytes:
        break
  return found


def _embed(path: epath.Path, *, side: int, quality: int) -> Picture | None:
  image = _open(path)
  return _shrink(image, side, quality) if image else None


def _open(path: epath.Path) -> Image.Image | None:
  try:
    with image_files.open_image(path.read_bytes()) as image:
      image.load()
      return image if image.mode == "RGB" else image.convert("RGB")
  except Exception:  # Pillow raises whatever it likes for a damaged file
    return None


def _shrink(image: Image.Image, side: int, quality: int) -> Picture:
  factor = min(1.0, side / max(image.size))
  width, height = (max(1, round(length * factor)) for length in image.size)
  image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=1.0)
  buffer = io.BytesIO()
  image.save(buffer, format="webp", quality=quality, method=1)
  return Picture(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size)
