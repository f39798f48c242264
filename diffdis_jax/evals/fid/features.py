"""Inception's features of images, on the devices that generate them, and the resizes to its 299 x 299 pixels.

Two conventions of resizing are in use, and statistics by one do not compare with the other's: "tensorflow" is what the
network's own graph does, and torch-fidelity's default; "clean" is clean-fid's. Both give values of 0 to 255, of which
the network sees (value - 128) / 128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from PIL import Image

from diffdis_jax.common.params import merge
from diffdis_jax.evals import base
from diffdis_jax.interop import inception as inception_file
from diffdis_jax.models.inception import SIDE
from diffdis_jax.parallel import batches, programs, sharding

KINDS = ("tensorflow", "clean")


class Extractor:
  """The network with its weights and one of the resizes, compiled. Images of one size compile the resize alone.

  Args:
    params: of the network, by path, on the host.
    kind: of the resize, one of KINDS.
    mesh: devices that share the rows of a call; each has all of the weights.
    batch_size, after_batch: as `batches.Batches` takes them.
  """

  def __init__(
    self,
    params: Mapping[str, Float[np.ndarray, "..."]],
    *,
    kind: str,
    mesh: Mesh,
    batch_size: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
  ):
    self._kind = kind
    self._batched = batches.Batches(mesh, batch_size, after_batch)
    # On every device: the network is small, and sharded weights would be gathered for each batch.
    self._params = sharding.replicated(params, mesh)
    compiled = lambda name, f: programs.Program(name, jax.jit(sharding.tracing(mesh, matmul_precision="highest")(f)))
    # Two programs: the resize depends on the images' size, and the network, which takes long to compile, does not.
    self._normalise = compiled("the resize for Inception", to_input)
    self._network = compiled("Inception", lambda params, x: merge(*inception_file.module(), dict(params))(x))

  def __call__(self, images: UInt8[np.ndarray, "n h w 3"] | Any) -> Float[np.ndarray, "n 2048"]:
    """Return the features of FID, of images or of what gives images by `[places]`, as `base.Images` does."""
    # clean-fid resizes by PIL, which runs on the host. TensorFlow's resize is a few gathers, on the device.
    resized = base.Rows(len(images), lambda places: clean(images[places]))
    shown = resized if self._kind == "clean" else images
    return self._batched(lambda x: self._network(self._params, self._normalise(x)), shown)


def to_input(images: UInt8[Array, "b h w 3"] | Float[Array, "b 299 299 3"]) -> Float[Array, "b 299 299 3"]:
  """Return what the network sees of images: of bytes by TensorFlow's resize, of floats as they are."""
  return ((tensorflow(images) if images.dtype == jnp.uint8 else images) - 128) / 128


def tensorflow(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b 299 299 3"]:
  """Resize bilinearly as TensorFlow 1 does it: no antialias, and grid points on corners, not on the middles of pixels.

  Source: torch-fidelity, interpolate_compat_tensorflow.py.
  """

  def along(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    size = x.shape[axis]
    place = np.arange(SIDE, dtype=np.float32) * (np.float32(size) / np.float32(SIDE))
    low = np.floor(place).astype(np.int32)
    part = (place - low.astype(np.float32)).reshape([-1] + [1] * (3 - axis))
    # Past the last pixel's corner there is nothing to go towards, and its own value counts.
    below, above = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, size - 1), axis)
    return below + (above - below) * part

  # Columns first, then rows, each rounded to f32: the other order gives other last bits.
  return along(along(images.astype(jnp.float32), 2), 1)


def clean(images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b 299 299 3"]:
  """Resize by PIL, bicubic and antialiased, each channel in f32, cut to 0 to 255, on the host.

  Source: clean-fid, resize.py.
  """

  def to_side(channel: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "299 299"]:
    # In f32, since PIL rounds what it resizes in bytes, which is what clean-fid is there to avoid.
    return np.asarray(Image.fromarray(channel.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))

  resized = [np.stack([to_side(image[..., i]) for i in range(3)], axis=-1) for image in images]
  return np.stack(resized).clip(0, 255)


def square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
  """Return a real image as generated ones are: its central square, in whole pixels, then to `size` by Lanczos.

  Source: U-ViT, datasets.py center_crop (not stated by the paper).
  """
  # Cut in whole pixels and before the resize, as U-ViT does: transforms.resize, of training, does both in one.
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  central = image.crop((left, top, left + side, top + side))
  return np.asarray(central.resize((size, size), Image.Resampling.LANCZOS))
