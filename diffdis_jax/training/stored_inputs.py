"""Whether stored latents and text conditions are of the encoders that a run trains with."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffdis_jax.common.params import Params
from diffdis_jax.errors import UserError

# What decides which posterior an image has: not the decoder, nor shift and scale, which are applied after reading.
ENCODER = re.compile(r"autoencoder\.(conv_in|down|encoder\w*|quant)\.")
TEXT_ENCODER = re.compile(r"text_encoder\.")
# What decides which condition a caption has: not what makes the text query of it, which follows after reading.
CONDITION = re.compile(r"text_encoder\.(?!projection\.|query_tokens\.)")


def fingerprint(params: Params, which: re.Pattern[str] = ENCODER) -> float:
  """A number that tells one encoder from another: the sum of its parameters' mean magnitudes, f32."""
  # Sorted: in another order the sum would round otherwise.
  encoder = {path: value for path, value in sorted(params.items()) if which.match(path)}
  return float(jax.jit(lambda encoder: sum(jnp.mean(jnp.abs(value)) for value in encoder.values()))(encoder))


def check_stored(facts: Mapping[str, Mapping[str, Any]], params: Params, trained: Collection[str]) -> None:
  """Raises UserError where stored latents or text conditions are of other encoders than these, or of one in training.

  Args:
    facts: path -> what the preparation of the latents there wrote of them.
    params: of the network.
    trained: paths of the parameters that training changes.
  """
  for path, fact in facts.items():
    stored = [("latents", "autoencoder", fact["fingerprint"], ENCODER)]
    if "text" in fact:
      if any(CONDITION.match(name) for name in trained):
        raise UserError(
          "the text encoder is trained, and stored text conditions would not follow it; freeze it in optim.groups, or"
          " prepare the latents without --text"
        )
      stored.append(("text conditions", "text encoder", fact["text"]["fingerprint"], CONDITION))
    for what, encoder, expected, which in stored:
      # Another device sums in another order; the result differs by rounding only.
      if not math.isclose(expected, fingerprint(params, which), rel_tol=1e-4):
        raise UserError(
          f"the {what} in {path} were made by another {encoder}; set init_from to the workdir that they were made with"
        )
