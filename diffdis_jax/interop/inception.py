"""Read the weights of FID's Inception network from the user's file of torch-fidelity or pytorch-fid."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Float

from diffdis_jax.common import buckets
from diffdis_jax.common.params import Params, flatten
from diffdis_jax.errors import UserError
from diffdis_jax.interop import tensor_files
from diffdis_jax.method.network import abstract_module
from diffdis_jax.models import inception

PUBLISHED = "6726825d"  # the beginning of the SHA-256 of the published file, which is part of its name
SOURCE = (
  "weights-inception-2015-12-05-6726825d.pth of torch-fidelity, pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or"
  " a safetensors copy of either"
)
# The end of a parameter's path -> the end of its tensor's name in the file.
ENDINGS = {"conv.kernel": "conv.weight", "bn.scale": "bn.weight", "bn.bias": "bn.bias"}
ENDINGS |= {"bn.mean": "bn.running_mean", "bn.var": "bn.running_var"}
UNUSED = "num_batches_tracked"  # only training uses it
# The classifier after the features. It is not used here, but a file without it is of another network.
CLASSIFIER = {"fc.weight": (inception.CLASSES, inception.WIDTH), "fc.bias": (inception.CLASSES,)}


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters by path, f32 on the host."""

  params: dict[str, Float[np.ndarray, "..."]]
  file_sha256: str
  sha256: str  # of the tensors, independent of the file's format
  published: bool  # whether the file is the published one


def name_of(path: str) -> str:
  """Return a parameter's name in the file, `Mixed_6b.branch7x7_2.bn.running_mean` of mixed_6b.branch7x7_2.bn.mean."""
  *block, layer, kind = path.split(".")
  return ".".join([block[0].capitalize(), *block[1:], ENDINGS[f"{layer}.{kind}"]])


@functools.cache
def module() -> tuple[nnx.GraphDef, nnx.State]:
  """Return the graph definition and the abstract state of the network, for `params.merge`."""
  return abstract_module(lambda rngs: inception.Inception(rngs=rngs))


def shapes() -> Params:
  """Return each parameter's ShapeDtypeStruct by its path."""
  return flatten(module()[1])


def read(path: str) -> Weights:
  """Read the file, and log its SHA-256.

  Raises UserError: the file is missing, cannot be read, would execute code, or has tensors of another network.
  """
  file = buckets.local(path, "--inception")
  tensors = {name: x for name, x in tensor_files.open_file(file).items() if not name.endswith(UNUSED)}
  expected = shapes()
  paths = {name_of(path): path for path in expected}
  if others := tensors.keys() ^ {*paths, *CLASSIFIER}:
    what = f"{len(others)} of its tensors are missing, or none of the network's, such as {min(others)}"
    raise UserError(f"{file} is not FID's Inception network of 2015-12-05: {what}; take {SOURCE}")
  params, digest = {}, hashlib.sha256()
  for name in sorted(tensors):
    value = tensors[name].read().astype(np.float32, order="C")
    # Hash the tensors before they are transposed, so that a pickle and safetensors give the same hash.
    digest.update(name.encode() + value.tobytes())
    if value.ndim == 4:
      value = np.ascontiguousarray(value.transpose(2, 3, 1, 0))
    shape = CLASSIFIER[name] if name in CLASSIFIER else expected[paths[name]].shape
    if value.shape != shape or not np.isfinite(value).all():
      raise UserError(f"{file}: {name} has another shape in FID's Inception, or is not finite; take {SOURCE}")
    if name in paths:
      params[paths[name]] = value
  with file.open("rb") as opened:
    file_sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
  logging.info("Inception weights %s, SHA-256 %s", file, file_sha256)
  if not (published := file_sha256.startswith(PUBLISHED)):
    why = "figures compare with others only if its tensors are the same"
    logging.warning("%s is not the published file, whose SHA-256 begins with %s: %s", file, PUBLISHED, why)
  return Weights(params, file_sha256, digest.hexdigest(), published)
