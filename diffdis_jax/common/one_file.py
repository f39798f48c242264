"""A run in one file: its config, one set of its weights, and where both come from, as safetensors. Without jax.

Such a file, FILE.safetensors or the name of one that comes with the package (shipped.py), is given where a workdir is
read. Vectors of tokens that training never reached are left out, and one stands for all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from diffdis_jax.common import files, shipped
from diffdis_jax.errors import UserError, parse_json

SUFFIX = shipped.SUFFIX
KEPT = "kept_tokens"  # i32[n], the tokens whose vectors are there; the last row of each table is of all others
_TABLES = ("tokens.embedding", "query_tokens.embedding")  # how the names of the tables of token vectors end
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32}
Arrays = dict[str, Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A file's description of its weights.

  Attributes:
    config: the run's, as its config.json has it.
    step: of the checkpoint.
    ema: whether they are averaged.
    provenance: of the run (run/provenance.py).
    licences: of what it was trained on, as text; empty where the data have none.
    initialised: the weights of an import that are random, which a run that starts from here draws by its own seed.
  """

  config: dict[str, Any]
  step: int
  ema: bool
  provenance: dict[str, Any]
  licences: str
  initialised: Sequence[str] = ()


def at(workdir: str | os.PathLike[str]) -> pathlib.Path | None:
  """Return the file that a path or a name stands for; None for a workdir. A folder of that name is a workdir."""
  given = os.fspath(workdir)
  if given.endswith(SUFFIX) and os.path.isfile(given):
    return pathlib.Path(given)
  return None if os.path.exists(given) else shipped.models().get(given)


def write(
  path: str | os.PathLike[str], params: Mapping[str, Shaped[np.ndarray, "..."]], record: Record, *, dtype: Any
) -> None:
  """Write a file, whole or not at all.

  Args:
    path: of it.
    params: the weights, flat.
    record: what it says of them.
    dtype: of the weights in it; logit_scale, whose exponential bf16 would move by up to 1.6 %, is in f32.

  Raises:
    UserError: it cannot be written, or a weight is not finite, or beyond the dtype's range.
  """
  arrays = _without_untrained(params, record)
  with np.errstate(over="ignore"):  # what became of it is looked at
    arrays = {
      name: each if name == KEPT else np.asarray(each, dtype if np.ndim(each) else np.float32, order="C")
      for name, each in arrays.items()
    }
  for name, each in arrays.items():
    if name != KEPT:
      check_written(name, np.asarray(params[name]), each)
  said = json.dumps(dataclasses.asdict(record), sort_keys=True)
  text = {"format": "diffdis_jax", "run": said, "sha256": _digest(said, arrays)}
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


def read_record(path: pathlib.Path) -> Record:
  """Read what a file says, from its first kilobytes. Raise UserError: it is damaged, or holds no run."""
  return _header(path)[0]


def check(path: pathlib.Path, step: int | None, *, ema: bool) -> Record:
  """Read what a file says, and check that it holds the step asked for, None for any, and the weights asked for.

  Raises:
    UserError: another step is in it, averaged weights alone are, or it is damaged.
  """
  there = read_record(path)
  if step not in (None, there.step):
    raise UserError(f"no checkpoint {step} in {path}, which holds that of step {there.step} alone")
  if there.ema and not ema:
    raise UserError(f"{path} holds averaged weights alone; leave --noema out")
  return there


def read_params(path: pathlib.Path) -> dict[str, Float32[np.ndarray, "..."]]:
  """Read the weights, f32, with every token's vector. Raise UserError: the file is damaged, or holds no run."""
  record, text = _header(path)
  try:
    arrays: Arrays = {
      name: np.frombuffer(each["data"], _DTYPES[each["dtype"]]).reshape(each["shape"])
      for name, each in deserialize(path.read_bytes())
    }
  except (SafetensorError, OSError, KeyError, ValueError) as error:
    raise _damaged(path, str(error)) from error
  if _digest(text["run"], arrays) != text["sha256"]:
    raise _damaged(path, "it holds other bytes than were written")
  kept = arrays.pop(KEPT, None)
  params = {name: each.astype(np.float32) for name, each in arrays.items()}
  if kept is not None:
    size = record.config["model"]["text_encoder"]["vocab_size"]
    for name in (name for name in arrays if name.endswith(_TABLES)):
      table, params[name] = params[name], np.repeat(params[name][-1:], size, axis=0)
      params[name][kept] = table[:-1]
  return params


def _without_untrained(params: Mapping[str, Shaped[np.ndarray, "..."]], record: Record) -> Arrays:
  """Leave out the vectors of tokens that were never trained; their mean becomes the last row.

  The token vectors that are added to the text query begin at zero (models/text_encoder.py), and those of tokens that
  discrimination never read are zero still. A run that trained none of these, or began from an import, keeps all tokens.
  """
  added = next((each for name, each in params.items() if name.endswith(_TABLES[1])), np.zeros((1, 1)))
  trained = (np.asarray(added) != 0).any(axis=1)
  origin = (record.provenance, *record.provenance.get("init_from", ()))
  if not trained.any() or trained.all() or any("imported" in each for each in origin):
    return dict(params)
  # They are read as all others, and not added to the query.
  trained[[record.config["model"]["text_encoder"][name] for name in ("bos_id", "eos_id")]] = True
  short = {
    name: np.concatenate([each[trained], each[~trained].mean(axis=0, keepdims=True)])
    for name, each in params.items()
    if name.endswith(_TABLES)
  }
  return {**params, **short, KEPT: np.flatnonzero(trained).astype(np.int32)}


def _header(path: pathlib.Path) -> tuple[Record, dict[str, str]]:
  """Read the record, and the texts of the header: 8 bytes of length, and as much JSON."""
  try:
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      # A damaged length may be any number.
      header = parse_json(file.read(min(length, path.stat().st_size)), "its header")
      text = {name: header["__metadata__"][name] for name in ("run", "sha256")}
  except (OSError, UserError, TypeError, KeyError) as error:
    raise UserError(
      f"{path} holds no run, or is damaged; it should be as export_weights wrote it{shipped.IMPORT_FIRST}"
    ) from error
  try:
    return Record(**parse_json(text["run"], "its run")), text
  except (UserError, TypeError) as error:
    raise _damaged(path, str(error)) from error


def _damaged(path: pathlib.Path, why: str) -> UserError:
  return UserError(f"{path} is damaged: {' '.join(why.split())[:200]}; copy it again")


def _digest(said: str, arrays: Arrays) -> str:
  """Return the SHA-256 of the record and of every array, whatever their order in the file."""
  digest = hashlib.sha256(said.encode())
  for name in sorted(arrays):
    each = arrays[name]
    digest.update(f"{name} {each.dtype} {each.shape}".encode() + each.tobytes())
  return digest.hexdigest()
