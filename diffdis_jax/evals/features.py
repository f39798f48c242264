"""Inception's features of images, on the devices that generate them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.common.params import merge
from diffdis_jax.config.section import check_choice
from diffdis_jax.evals import resize
from diffdis_jax.interop import inception as inception_file
from diffdis_jax.parallel import batches, programs, sharding


class Extractor:
  """The network with its weights and one of the resizes, compiled. Images of one size compile the resize alone.

  Args:
    params: of the network, by path, on the host.
    kind: of the resize, one of `resize.KINDS`.
    mesh: devices that share the rows of a call; each has all of the weights.
    batch_size: rows a compiled call, as `batches.Batches` has it.
    after_batch: called after each compiled call, as `batches.Batches` has it.

  Raises:
    UserError: no such resize.
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
    check_choice("resize", kind, resize.KINDS)
    self._kind = kind
    self._batched = batches.Batches(mesh, batch_size, after_batch)
    # On every device: the network is small, and sharded weights would be gathered for each batch.
    self._params = sharding.replicated(params, mesh)
    compiled = lambda name, f: programs.Program(name, jax.jit(sharding.traced_for(mesh, f, matmul_precision="highest")))
    # Two programs: the resize depends on the images' size, and the network, which takes long to compile, does not.
    self._normalise = compiled("the resize for Inception", self._normalised)
    self._network = compiled("Inception", self._features)

  def __call__(self, images: UInt8[np.ndarray, "n h w 3"] | Any) -> Float[np.ndarray, "n 2048"]:
    """Return the features of FID, of images or of what gives images by `[places]`, as `base.Images` does."""
    # clean-fid resizes by PIL, which runs on the host. TensorFlow's resize is a few gathers, on the device.
    shown = _Clean(images) if self._kind == "clean" else images
    return self._batched(lambda x: self._network(self._params, self._normalise(x)), shown)

  def _normalised(self, images: UInt8[Array, "b h w 3"] | Float[Array, "b 299 299 3"]) -> Float[Array, "b 299 299 3"]:
    return resize.to_input(resize.tensorflow(images) if images.dtype == jnp.uint8 else images)

  def _features(self, params: Mapping[str, Any], x: Float[Array, "b 299 299 3"]) -> Float[Array, "b 2048"]:
    return merge(*inception_file.module(), dict(params))(x)


@dataclasses.dataclass(frozen=True)
class _Clean:
  """Images, resized on the host when they are asked for: each process resizes its own rows alone."""

  images: UInt8[np.ndarray, "n h w 3"] | Any

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, places: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b 299 299 3"]:
    return resize.clean(self.images[places])
