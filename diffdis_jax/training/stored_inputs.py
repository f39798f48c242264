"""Check that stored latents and text conditions are of the encoders that a run trains with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from diffdis_jax.common.params import Params
from diffdis_jax.config.model import Model
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes

# What decides which posterior an image has: not the decoder, nor shift and scale, which are applied after reading.
ENCODER = re.compile(r"autoencoder\.(conv_in|down|encoder\w*|quant)\.")
TEXT_ENCODER = re.compile(r"text_encoder\.")
# What decides which condition a caption has: not what makes the text query of it, which follows after reading.
CONDITION = re.compile(r"text_encoder\.(?!projection\.|query_tokens\.)")
_AFTER_READING = {"shift", "scale", "projection", "token_embedding_weight"}  # fields of the config


def autoencoder_digest(params: Params, model: Model) -> str:
  """Return the digest of what decides which posterior an image has."""
  return _digest(params, ENCODER, model.autoencoder)


def text_encoder_digest(params: Params, model: Model) -> str:
  """Return the digest of what decides which condition a caption has."""
  return _digest(params, CONDITION, model.text_encoder)


def _digest(params: Params, which: re.Pattern[str], size: Any) -> str:
  """Return the SHA-256 of these parameters' bytes and of the config's fields, such as heads, that none of them shows.

  It is the same on every process and for any mesh: each array is gathered whole, one after another.
  """
  fields = {name: value for name, value in dataclasses.asdict(size).items() if name not in _AFTER_READING}
  digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
  for path, value in sorted(params.items()):
    if which.match(path):
      digest.update(f"{path} {value.shape} {value.dtype}".encode())
      whole = processes.whole(value) if isinstance(value, jax.Array) else value
      digest.update(np.asarray(whole).tobytes())
  return digest.hexdigest()


def check_stored(
  facts: Mapping[str, Mapping[str, Any]], params: Params, model: Model, trained: Collection[str]
) -> None:
  """Refuse stored latents or text conditions of other encoders than these, or of one in training.

  Args:
    facts: path -> what the preparation of the latents there wrote of them.
    params: of the network.
    model: its config.
    trained: paths of the parameters that training changes.

  Raises:
    UserError: they are.
  """
  for path, fact in facts.items():
    stored = [("latents", "autoencoder", fact["fingerprint"], autoencoder_digest)]
    if "text" in fact:
      if any(CONDITION.match(name) for name in trained):
        raise UserError(
          "the text encoder is trained, and stored text conditions would not follow it; freeze it in optim.groups, or"
          " prepare the latents without --text"
        )
      stored.append(("text conditions", "text encoder", fact["text"]["fingerprint"], text_encoder_digest))
    for what, encoder, expected, digest in stored:
      if expected != digest(params, model):
        raise UserError(
          f"the {what} in {path} were made by another {encoder}; set init_from to the workdir that they were made with"
        )
