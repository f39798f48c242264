"""Digests of the autoencoder by which latents were stored, so that a run takes those of no other one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdis_jax.common.params import Params
from diffdis_jax.config.model import Model
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes

# These decide which posterior an image has: not the decoder, nor shift and scale, which are applied after reading.
_ENCODER = re.compile(r"autoencoder\.(conv_in|down|encoder\w*|quant)\.")
_AFTER_READING = {"shift", "scale"}  # fields of the config


def autoencoder_digest(params: Params, model: Model) -> str:
  """Return the SHA-256 of the parameters and fields that decide which posterior an image has: of the parameters' bytes,
  and of the config's fields, such as heads, that none of them shows. It is the same on every process and any mesh."""
  fields = {name: x for name, x in dataclasses.asdict(model.autoencoder).items() if name not in _AFTER_READING}
  digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
  for path, value in sorted(params.items()):
    if _ENCODER.match(path):
      digest.update(f"{path} {value.shape} {value.dtype}".encode())
      digest.update(np.asarray(processes.whole(value)).tobytes())
  return digest.hexdigest()


def check_stored(facts: Mapping[str, Mapping[str, Any]], params: Params, model: Model) -> None:
  """Raise UserError for stored latents of another autoencoder than this. `facts` has, by its path, what the preparation
  of latents wrote of them."""
  for path, fact in facts.items():
    if fact["fingerprint"] != autoencoder_digest(params, model):
      raise UserError(
        f"the latents in {path} were made by another autoencoder; set init_from to the workdir that they were made with"
      )
