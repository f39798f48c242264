"""Make a grid of images with their captions underneath."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from diffdis_jax.common import buckets, files
from diffdis_jax.data import image_files

TILE = 128  # pixels: smaller images are enlarged by a whole factor until they are about as wide
FONT_SIZE = 13
LINE_HEIGHT = 16
MAX_LINES = 3
GAP = 8
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_grid(
  images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], path: str | os.PathLike, *, columns: int = 8
) -> None:
  """Write a PNG, row by row, whole or not at all. Small images are enlarged without smoothing."""
  files.write_whole(buckets.path(path), image_files.png(draw_grid(images, captions, columns=columns)))


def draw_grid(images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], *, columns: int) -> Image.Image:
  """Return the picture that `save_grid` writes. Raises ValueError: not one caption an image, or no image."""
  if not len(images) or len(images) != len(captions):
    raise ValueError(f"{len(images)} images and {len(captions)} captions; each image needs one")
  count, height, width, _ = images.shape
  # A whole factor: between pixels nothing is made up that the model did not generate.
  factor = max(1, round(TILE / width))
  font = ImageFont.load_default(FONT_SIZE)
  # The longest caption decides for all rows, so that tiles stay in line.
  lines = [wrap(caption, font, width * factor) for caption in captions]
  text_height = LINE_HEIGHT * max(map(len, lines))
  step_x, step_y = width * factor + GAP, height * factor + text_height + GAP

  columns = min(columns, count)
  rows = -(-count // columns)
  grid = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
  draw = ImageDraw.Draw(grid)
  for i, (image, text) in enumerate(zip(images, lines, strict=True)):
    x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
    tile = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
    grid.paste(tile, (x, y))
    for j, line in enumerate(text):
      draw.text((x, y + height * factor + j * LINE_HEIGHT), line, fill="black", font=font)
  return grid


def wrap(caption: str, font: Font, width: int) -> list[str]:
  """Return lines no wider than `width` pixels, at most MAX_LINES, the last one cut off with dots where that is too
  few."""
  # As many letters as fit, whichever they are: of the widest first, then of all.
  for letters in range(int(width // font.getlength("i")), 4, -1):
    lines = textwrap.wrap(caption, letters, max_lines=MAX_LINES, placeholder="...") or [""]
    if all(font.getlength(line) <= width for line in lines):
      return lines
  return [""]
