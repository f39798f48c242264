"""A run in one file: its config, one set of its weights, and where both come from, as safetensors. Without jax.

Such a file, FILE.safetensors or the name of one that comes with the package, in `diffdis_jax/shipped`, is given where a
workdir is read. Vectors of tokens that training never reached may be left out, and one stands for all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffdis_jax.common import files
from diffdis_jax.errors import UserError, parse_json

SUFFIX = ".safetensors"
IMPORT_FIRST = "; weights of PyTorch take diffdis import_weights first"
# In a folder of diffusers, of open_clip and of transformers, whose config has the name of a run's.
_OF_PYTORCH = ("model_index.json", "open_clip_config.json", "model.safetensors", "pytorch_model.bin")
KEPT = "kept_tokens"  # i32[n], the tokens whose vectors are there; the last row of each table is of all others
_TABLES = ("tokens.embedding", "query_tokens.embedding")  # how the names of the tables of token vectors end
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
    results: what evaluate measured of these weights: {file: {task: {data set: record}}}.
  """

  config: dict[str, Any]
  step: int
  ema: bool
  provenance: dict[str, Any]
  licences: str
  initialised: Sequence[str] = ()
  results: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def models() -> dict[str, pathlib.Path]:
  """Return the file of each trained model that comes with the package, by its name."""
  return {path.stem: path for path in sorted((pathlib.Path(__file__).parents[1] / "shipped").glob(f"*{SUFFIX}"))}


def at(workdir: str | os.PathLike[str]) -> pathlib.Path | None:
  """Return the file that a path or a name stands for; None for a workdir. A folder of that name is a workdir."""
  given = os.fspath(workdir)
  if given.endswith(SUFFIX) and os.path.isfile(given):
    return pathlib.Path(given)
  return None if os.path.exists(given) else models().get(given)


def meant(given: str | os.PathLike[str]) -> str:
  """Say what a path that is no workdir may mean: weights of PyTorch, a run below the folder, or a trained model of
  almost this name. Return an empty text where nothing is near."""
  path = pathlib.Path(given)
  if path.is_file() or any((path / name).is_file() for name in _OF_PYTORCH):
    return IMPORT_FIRST
  if below := sorted(file.parent for deep in ("*", "runs/*") for file in path.glob(f"{deep}/config.json")):
    return f"; below it is {below[0]}"
  near = difflib.get_close_matches(os.fspath(given), models(), n=1)
  return f"; did you mean {near[0]}?" if near else ""


def write(
  path: str | os.PathLike[str],
  params: Mapping[str, Shaped[np.ndarray, "..."]],
  record: Record,
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
    if name == KEPT:
      arrays[name] = value
      continue
    with np.errstate(over="ignore"):  # what became of it is looked at
      arrays[name] = np.asarray(value, dtype if np.ndim(value) else np.float32, order="C")
    check_written(name, np.asarray(params[name]), arrays[name])
  run = json.dumps(dataclasses.asdict(record), sort_keys=True)
  text = {"format": "diffdis_jax", "run": run, "sha256": _digest(run, arrays)}
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
  """Read what a file says, and none of its arrays. Raise UserError: it is damaged, or holds no run."""
  return _read(path)[0]


def check(path: pathlib.Path, step: int | None, *, ema: bool) -> Record:
  """Read what a file says. Raise UserError: it lacks this step or the raw weights (not `ema`), or is damaged."""
  there = read_record(path)
  if step not in (None, there.step):
    raise UserError(f"no checkpoint {step} in {path}, which holds that of step {there.step} alone")
  if there.ema and not ema:
    raise UserError(f"{path} holds averaged weights alone; leave --noema out")
  return there


def read_params(path: pathlib.Path) -> dict[str, Float32[np.ndarray, "..."]]:
  """Read the weights, f32, with every token's vector. Raise UserError: the file is damaged, or holds no run."""
  record, arrays = _read(path, arrays=True)
  kept = arrays.pop(KEPT, None)
  params = {name: array.astype(np.float32) for name, array in arrays.items()}
  if kept is not None:
    size = record.config["model"]["text_encoder"]["vocab_size"]
    for name in (name for name in arrays if name.endswith(_TABLES)):
      table, params[name] = params[name], np.repeat(params[name][-1:], size, axis=0)
      params[name][kept] = table[:-1]
  return params


def _read(path: pathlib.Path, *, arrays: bool = False) -> tuple[Record, Arrays]:
  """Read the record and, if asked, all arrays, whose digest is compared."""
  try:
    with safe_open(path, "numpy") as file:
      text, found = file.metadata() or {}, {name: file.get_tensor(name) for name in (file.keys() if arrays else ())}
    if "run" not in text:
      raise UserError(f"{path} holds no run; it should be as export_weights wrote it{IMPORT_FIRST}")
    if arrays and _digest(text["run"], found) != text.get("sha256"):
      raise ValueError("it holds other bytes than were written")
    return Record(**parse_json(text["run"], "its run")), found
  except (SafetensorError, OSError, TypeError, ValueError) as error:
    raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; copy it again") from error


def _without_unread(
  params: Mapping[str, Shaped[np.ndarray, "..."]], record: Record, tokens: Iterable[int] | None
) -> Arrays:
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
    added = next((each for name, each in params.items() if name.endswith(_TABLES[1])), np.zeros((1, 1)))
    kept = (np.asarray(added) != 0).any(axis=1)
    origin = (record.provenance, *record.provenance.get("init_from", ()))
    if not kept.any() or any("imported" in each for each in origin):
      return dict(params)
  if kept.all():
    return dict(params)
  # They are read as all others, and not added to the query.
  kept[[text[name] for name in ("bos_id", "eos_id")]] = True
  short = {
    name: np.concatenate([each[kept], each[~kept].mean(axis=0, keepdims=True)])
    for name, each in params.items()
    if name.endswith(_TABLES)
  }
  return {**params, **short, KEPT: np.flatnonzero(kept).astype(np.int32)}


def _digest(run: str, arrays: Arrays) -> str:
  """Return the SHA-256 of the record and of every array, whatever their order in the file."""
  digest = hashlib.sha256(run.encode())
  for name, array in sorted(arrays.items()):
    digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
  return digest.hexdigest()
