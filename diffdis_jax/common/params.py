"""Handle parameters as a flat dict, path -> array, and match regexes against its paths.

A path is the attribute names from the model down, joined by dots: `unet.down.0.attentions.1.proj_in.kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flax import nnx

from diffdis_jax.errors import UserError

Params = dict[str, Any]


def flatten(state: nnx.State) -> Params:
  """Turn an nnx state into {dotted path: array or ShapeDtypeStruct}, sorted by name, list elements by number."""
  return {".".join(map(str, path)): var.get_value() for path, var in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef, abstract: nnx.State, params: Params) -> Any:
  """Return the module with `params` in place. `abstract` is the state that `params` was flattened from."""
  # Replace the value inside its variable: nnx needs the variable's kind and metadata.
  flat = [(path, var.replace(params[".".join(map(str, path))])) for path, var in nnx.to_flat_state(abstract)]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def first_match(path: str, rules: Sequence[tuple[str, Any]], what: str) -> Any:
  """Return the value of the first rule whose regex matches somewhere in `path`.

  Raises:
    UserError: no rule matches; `what` names the table in the message.
  """
  for pattern, value in rules:
    if re.search(pattern, path):  # it may match anywhere: a rule for the beginning has a ^
      return value
  raise UserError(f"no rule of {what} matches parameter {path}; add one, such as ('.*', ...) at the end")
