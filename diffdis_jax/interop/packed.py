"""Write a run to one file, which common/one_file.py reads.

The embeddings of tokens that never occurred in training may be replaced by their mean.
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
  """Write the weights and their record to a file, completely or not at all.

  All weights but logit_scale get this `dtype`: bf16 would change the exponential of logit_scale by up to 1.6 %.

  Args:
    tokens: ids of the tokens whose embeddings are kept; None keeps all that may have occurred in training.

  Raises:
    UserError: the file cannot be written, or a weight is not finite or beyond the dtype's range.
  """
  arrays = {}
  for name, value in _without_unread(params, record, tokens).items():
    if name == one_file.KEPT:
      arrays[name] = value
      continue
    with np.errstate(over="ignore"):  # the result is checked below
      arrays[name] = np.asarray(value, dtype if np.ndim(value) else np.float32, order="C")
    check_written(name, np.asarray(params[name]), arrays[name])
  run = json.dumps(dataclasses.asdict(record), sort_keys=True)
  text = {"format": "diffdis_jax", "run": run, "sha256": one_file.digest(run, arrays)}
  with files.writing(f"--out={path}"):
    files.write_whole(pathlib.Path(path), save(arrays, metadata=text))


def check_written(name: str, value: Shaped[np.ndarray, "..."], written: Shaped[np.ndarray, "..."]) -> None:
  """Raise UserError unless the numbers of a parameter are finite after their cast to the dtype of `written`."""
  # Checked in f32, since bfloat16 is not numpy's own dtype.
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
  """Keep only the embeddings of `tokens`, and append the mean of the others as the last row.

  By default all tokens are kept that were trained. The token embeddings that are added to the text query start at zero
  (models/text_encoder.py), so that those of tokens which discrimination never read are still zero. A run that trained
  none of these, or began from an import, keeps all tokens.
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
  # These two tokens are read like others, but not added to the query.
  kept[[text[name] for name in ("bos_id", "eos_id")]] = True
  short = {
    name: np.concatenate([array[kept], array[~kept].mean(axis=0, keepdims=True)])
    for name, array in params.items()
    if name.endswith(one_file.TABLES)
  }
  return {**params, **short, one_file.KEPT: np.flatnonzero(kept).astype(np.int32)}
