"""Resize images to the 299 x 299 pixels of Inception's input, by two conventions, which give different features.

"tensorflow" is what the network's own graph does, and torch-fidelity's default; "clean" is clean-fid's. Both give
values of 0 to 255, of which the network sees (value - 128) / 128. Statistics by one do not compare with the other's.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from diffdis_jax.models.inception import SIDE

KINDS = ("tensorflow", "clean")
RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


def to_input(x: Float[Array, "b 299 299 3"]) -> Float[Array, "b 299 299 3"]:
  """Bring values of 0 to 255 to what the network sees."""
  return (x - 128) / 128


def tensorflow(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b 299 299 3"]:
  """Resize bilinearly as TensorFlow 1 does it: no antialias, and grid points on corners, not on the middles of pixels.

  Source: torch-fidelity, interpolate_compat_tensorflow.py.
  """
  x = images.astype(jnp.float32)
  # Columns first, then rows, each rounded to f32: the other order gives other last bits.
  columns, rows = _grid(x.shape[2]), _grid(x.shape[1])
  x = _between(x[:, :, columns.low], x[:, :, columns.high], columns.part[:, None])
  return _between(x[:, rows.low], x[:, rows.high], rows.part[:, None, None])


@dataclasses.dataclass(frozen=True)
class _Grid:
  """The old places below and above each of the new ones, and how far it is between them."""

  low: Int[np.ndarray, "299"]
  high: Int[np.ndarray, "299"]
  part: Float[np.ndarray, "299"]


def _grid(size: int) -> _Grid:
  place = np.arange(SIDE, dtype=np.float32) * (np.float32(size) / np.float32(SIDE))
  low = np.floor(place).astype(np.int32)
  # Past the last pixel's corner there is nothing to go towards, and its own value counts.
  return _Grid(low, np.minimum(low + 1, size - 1), place - low.astype(np.float32))


def _between(
  low: Float[Array, "..."], high: Float[Array, "..."], part: Float[np.ndarray, "..."]
) -> Float[Array, "..."]:
  return low + (high - low) * part


def clean(images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b 299 299 3"]:
  """Resize by PIL, bicubic and antialiased, each channel in f32, cut to 0 to 255, on the host.

  Source: clean-fid, resize.py.
  """

  def to_side(channel: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "299 299"]:
    # In f32, since PIL rounds what it resizes in bytes, which is what clean-fid is there to avoid.
    return np.asarray(Image.fromarray(channel.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))

  resized = [np.stack([to_side(image[..., i]) for i in range(3)], axis=-1) for image in images]
  return np.stack(resized).clip(0, 255)


def square(image: Image.Image, size: int, resampling: str) -> UInt8[np.ndarray, "size size 3"]:
  """Return a real image as generated ones are: its central square, in whole pixels, then to `size` by one of
  RESAMPLING.

  Source: U-ViT, datasets.py center_crop, which takes Lanczos (not stated by the paper).
  """
  # Cut in whole pixels and before the resize, as U-ViT does: transforms.resize, of training, does both in one.
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  central = image.crop((left, top, left + side, top + side))
  return np.asarray(central.resize((size, size), RESAMPLING[resampling]))
