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

# Longest side, and quality of WebP, from the finest on.
SIZES = ((1600, 85), (1280, 80), (1024, 72), (832, 62), (704, 52), (576, 44), (448, 38), (352, 34), (256, 30))
TRIED = 3  # pictures by whose sizes the finest is chosen that fits


@dataclasses.dataclass(frozen=True)
class Picture:
  """WebP as a data URI, and its size in pixels."""

  uri: str
  width: int
  height: int


def embed(paths: Sequence[epath.Path], *, most_bytes: int) -> list[Picture | None]:
  """Each file as a picture, all at one longest side and quality; None for a file that is no picture, or not yet.

  Args:
    most_bytes: of all data URIs together. At the coarsest of SIZES it may be more.
  """
  tried = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, TRIED).astype(int))] if paths else []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for place, (side, quality) in enumerate(SIZES):
      last = place == len(SIZES) - 1
      shrink = functools.partial(_embed, side=side, quality=quality)
      few = [picture for picture in map(shrink, tried) if picture]
      if not last and few and np.mean([len(picture.uri) for picture in few]) * len(paths) > most_bytes:
        continue
      found = list(pool.map(shrink, paths))
      if last or sum(len(picture.uri) for picture in found if picture) <= most_bytes:
        return found
  return []


def _embed(path: epath.Path, *, side: int, quality: int) -> Picture | None:
  try:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
      image = image.convert("RGB")
  except (OSError, ValueError):
    return None
  image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=1.0)
  buffer = io.BytesIO()
  image.save(buffer, format="webp", quality=quality, method=1)
  return Picture(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size)
