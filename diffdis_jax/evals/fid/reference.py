"""Statistics of real images in a file: .npz with `mu` and `sigma` in f64, as pytorch-fid reads and writes them.

Ours has three fields more: `num_images`, `protocol` (JSON: how they were made) and `features` in f32, of which KID is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError, may_pass, parse_json
from diffdis_jax.evals.fid import distances
from diffdis_jax.models.inception import WIDTH

FORM = "it should be an .npz with mu [2048] and sigma [2048, 2048], as pytorch-fid or this command writes it"
# Of a reference's protocol: what must be as in the measurement, and what should be.
MUST = {"resize": "resize", "weights_sha256": "Inception weights"}
SHOULD = ("image_size", "images")


@dataclasses.dataclass(frozen=True)
class Reference:
  """The statistics that generated images are compared with."""

  gaussian: distances.Gaussian  # of the real images' features
  features: Float[np.ndarray, "n d"] | None  # in f32; None where a file lacks them, and then there is no KID
  protocol: dict[str, Any] | None  # how they were made; None where a file does not say

  @property
  def sha256(self) -> str:
    """Return the hash of mean and covariance."""
    return hashlib.sha256(self.gaussian.mean.tobytes() + self.gaussian.covariance.tobytes()).hexdigest()


def write(path: str | os.PathLike[str], reference: Reference) -> None:
  """Write a reference that has features. Raises UserError: it cannot be written."""
  buffer = io.BytesIO()
  content: dict[str, Any] = {
    "mu": reference.gaussian.mean,
    "sigma": reference.gaussian.covariance,
    "num_images": np.asarray(reference.gaussian.count),
    "protocol": np.asarray(json.dumps(reference.protocol)),
    # More than pytorch-fid keeps, since KID cannot be had from mean and covariance.
    "features": reference.features,
  }
  np.savez(buffer, **content)
  with files.writing(f"--reference={path}"):
    buckets.path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(buckets.path(path), buffer.getvalue())


def read(path: str | os.PathLike[str]) -> Reference:
  """Read a file of ours, or of another tool, whose protocol is then unknown.

  Raises UserError: unreadable, or statistics of something else than Inception's 2048 features of two images or more.
  """
  try:
    with buckets.path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
      content = {name: file[name] for name in file.files}
    # f64 whatever the file has: the trace of the square root is a small difference of large numbers.
    mean, covariance = (content[name].astype(np.float64) for name in ("mu", "sigma"))
    protocol = parse_json(str(content["protocol"]), f"the protocol of {path}") if "protocol" in content else None
    count = int(content["num_images"]) if "num_images" in content else None
  except Exception as error:  # numpy raises whatever it likes for a damaged file
    if may_pass(error):
      raise
    raise UserError(f"cannot read --reference={path}: {error}; {FORM}") from error
  features = content.get("features")
  # A file of another layer or network has other widths; FID of it would be another measure.
  shapes = [mean.shape == (WIDTH,), covariance.shape == (WIDTH, WIDTH), isinstance(protocol, dict | None)]
  if features is not None:
    shapes.append(features.ndim == 2 and features.shape[1] == WIDTH and len(features) >= 2)
  if not all(shapes):
    there = {name: list(value.shape) for name, value in content.items()}
    raise UserError(f"--reference={path} has {there}; {FORM}")
  if not all(np.isfinite(x).all() for x in (mean, covariance, features) if x is not None):
    raise UserError(f"--reference={path} holds values that are not finite; {FORM}")
  if count is not None and count < 2:
    raise UserError(f"--reference={path} is of {count} images; it takes at least 2")
  return Reference(distances.Gaussian(mean, covariance, count), features, protocol)


def check(reference: Reference, expected: Mapping[str, Any], path: str) -> None:
  """Check that statistics compare with what is measured, whose protocol is `expected`. Of other tools' only a warning
  can be given.

  Raises UserError: they were made by another resize, or with other weights.
  """
  # Other tools write no protocol. They are what users have, so the doubt is said and the file taken.
  protocol = reference.protocol
  if protocol is None:
    unknown = "does not say how it was made: its resize is unknown, and the figure right only if it was"
    logging.warning("--reference=%s %s %s", path, unknown, expected["resize"])
    return
  for name, what in MUST.items():
    if protocol.get(name) != expected[name]:
      raise UserError(
        f"--reference={path} is of another {what}, {protocol.get(name)}, and this measurement's is {expected[name]};"
        " they do not compare: name a new file, which is then made"
      )
  # The same file may serve prompts of another set, if that is what is wanted.
  for name in SHOULD:
    if protocol.get(name) != expected[name]:
      theirs = protocol.get(name)
      logging.warning("--reference=%s has %s %s, and this measurement %s", path, name, theirs, expected[name])
