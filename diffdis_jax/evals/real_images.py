"""The real images of FID's reference, cut and resized as generated ones are, decoded by several threads."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from diffdis_jax.common import buckets
from diffdis_jax.data import records, transforms
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, resize

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
THREADS = 8  # that decode


@dataclasses.dataclass(frozen=True)
class Folder:
  """A source of the images in a folder, in the order of their names; of the folders in it, none."""

  files: Sequence[pathlib.Path]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self.files[index].read_bytes(), "caption": "", "key": self.files[index].name}


def open_folder(path: str | os.PathLike[str]) -> Folder:
  """Raises UserError: no folder there, or fewer than two images in it."""
  folder = buckets.local(path, "the reference's folder")
  if not folder.is_dir():
    raise UserError(f"no folder {folder}; it should hold the reference's images, {', '.join(ENDINGS)}")
  files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
  if len(files) < 2:
    raise UserError(f"{folder} holds {len(files)} images ({', '.join(ENDINGS)}); a reference takes at least 2")
  return Folder(files)


@dataclasses.dataclass(frozen=True)
class RealImages:
  """Central squares of a source's images, u8[n h w 3], decoded when they are asked for.

  Attributes:
    source: its records have `image`, encoded or as u8[h w 3].
    indices: which of them, in which order.
    image_size: pixels.
    resampling: one of `resize.RESAMPLING`.
  """

  source: Any
  indices: Int[np.ndarray, " n"]
  image_size: int
  resampling: str

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, places: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Raises UserError: a record whose image cannot be decoded."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      return np.stack(list(pool.map(self._square, self.indices[places].tolist())))

  def _square(self, index: int) -> UInt8[np.ndarray, "s s 3"]:
    image = base.read(self.source, index)["image"]
    try:
      decoded = transforms.decode(image) if isinstance(image, np.ndarray) else records.read_image(image)
    except records.Unusable as error:
      raise UserError(f"record {index} of the reference's images is no use: {error}") from error
    return resize.square(decoded, self.image_size, self.resampling)
