"""Synthetic photographs in tars, as img2dataset packs them."""

from __future__ import annotations

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

SOURCE = 512  # pixels of a synthetic photograph
REPEATS = 10  # of the images: fewer records than some thousands take longer to shuffle, for the way Grain does it


def photo(rng: np.random.Generator, side: int) -> bytes:
  """Return a JPEG of about a photograph's entropy: soft shapes, texture, grain."""
  noise = lambda n: Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8))
  layer = lambda n: np.asarray(noise(n).resize((side, side), Image.Resampling.BICUBIC), np.float32)
  # Size and time of decoding follow from entropy: plain colours would be decoded too fast, pure noise too slowly.
  pixels = 0.75 * layer(12) + 0.2 * layer(side // 8) + rng.normal(0, 4, (side, side, 3))
  file = io.BytesIO()
  Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
  return file.getvalue()


def write_tar(path: pathlib.Path, images: list[bytes], count: int, seed: int) -> None:
  """Write `count` pairs of these images, as img2dataset packs them, each with a caption of its own."""
  rng = np.random.default_rng(seed)
  words = "a photo of the red old small house with two people near river and green trees in winter light".split()
  with tarfile.open(path, "w") as tar:
    for i in range(count):
      caption = " ".join(rng.choice(words, rng.integers(6, 14)))
      for ending, data in (("jpg", images[i % len(images)]), ("txt", caption.encode()), ("json", b"{}")):
        member = tarfile.TarInfo(f"{i:06d}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def write_photos(folder: pathlib.Path, images: int) -> pathlib.Path:
  """Write a new folder with one tar of photographs, each REPEATS times."""
  raw, rng = folder / "raw", np.random.default_rng(0)
  raw.mkdir()
  write_tar(raw / "train-00000.tar", [photo(rng, SOURCE) for _ in range(images)], REPEATS * images, seed=0)
  return raw
