"""Write a run into one file, as common/one_file.py reads it.

Vectors of tokens that training never reached may be left out, and one stands for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors.numpy import save

from diffdis_jax.common import files, one_file
from diffdis_jax.errors import UserError


def write(
  path: str | os.PathLike[str],
  params: Mapping[str, Shaped[np.ndarray, "..."]],
  record: one_file.Record,
  *,
  dtype: Any,
  tokens: Iterable[int] | None = None,
) -> None:
  """Write the weights, flat, and what the record says of them, whole or not at all.

  All but logit_scale are of this `dtype`: the exponential of logit_scale would move by up to 1.6 % in bf16.

  Args:
    tokens: ids of the tokens whose vectors are kept; None keeps all that training may have reached.

  Raises:
    UserError: it cannot be written, or a weight is not finite, or beyond the dtype's range.
  """
  arrays = {}
  for name, value in _without_unread(params, record, tokens).items():
    if name == one_file.KEPT:
      arrays[name] = value
      continue
    with np.errstate(over="ignore"):  # what became of it is looked at
      arrays[name] = np.asarray(value, dtype if np.ndim(value) else np.float32, order="C")
    check_written(name, np.asarray(params[name]), arrays[name])
  run = json.dumps(dataclasses.asdict(record), sort_keys=True)
  text = {"format": "diffdis_jax", "run": run, "sha256": one_file.digest(run, arrays)}
  with files.writing(f"--out={path}"):
    files.write_whole(pathlib.Path(path), save(arrays, metadata=text))


def check_written(name: str, value: Shaped[np.ndarray, "..."], written: Shaped[np.ndarray, "..."]) -> None:
  """Raise UserError unless a parameter's numbers, as they are `written` in a dtype of their own, are finite."""
  # In f32, for bfloat16, which is not numpy's own.
  if np.isfinite(written.astype(np.float32)).all():
    return
  if np.isfinite(value.astype(np.float32)).all():
    raise UserError(f"parameter {name} is beyond the range of {written.dtype}; take another --dtype")
  raise UserError(
    f"parameter {name} is not finite, as after training that diverged; take an earlier checkpoint, --step"
  )


def _without_unread(
  params: Mapping[str, Shaped[np.ndarray, "..."]], record: one_file.Record, tokens: Iterable[int] | None
) -> one_file.Arrays:
  """Leave out the vectors of all tokens but these; their mean becomes the last row.

  By default they are those that were never trained. The token vectors that are added to the text query begin at zero
  (models/text_encoder.py), and those of tokens that discrimination never read are zero still. A run that trained none
  of these, or began from an import, keeps all tokens.
  """
  text = record.config["model"].get("text_encoder", {})
  if tokens is not None:
    kept = np.zeros(text.get("vocab_size", 0), bool)
    kept[[*tokens]] = True
  else:
    added = next((array for name, array in params.items() if name.endswith(one_file.TABLES[1])), np.zeros((1, 1)))
    kept = (np.asarray(added) != 0).any(axis=1)
    origin = (record.provenance, *record.provenance.get("init_from", ()))
    if not kept.any() or any("imported" in link for link in origin):
      return dict(params)
  if kept.all():
    return dict(params)
  # They are read as all others, and not added to the query.
  kept[[text[name] for name in ("bos_id", "eos_id")]] = True
  short = {
    name: np.concatenate([array[kept], array[~kept].mean(axis=0, keepdims=True)])
    for name, array in params.items()
    if name.endswith(one_file.TABLES)
  }
  return {**params, **short, one_file.KEPT: np.flatnonzero(kept).astype(np.int32)}
