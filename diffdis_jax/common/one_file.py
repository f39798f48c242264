"""A run in one file: its config, one set of its weights, and where both come from, as safetensors. Without jax.

Such a file, FILE.safetensors or the name of one that comes with the package, in `diffdis_jax/shipped`, is given where a
workdir is read; interop/packed.py writes it. One vector may stand for those of all tokens that training never reached.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  which teaches numpy, and so safetensors, bfloat16
import numpy as np
from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, safe_open

from diffdis_jax.errors import UserError, parse_json

SUFFIX = ".safetensors"
IMPORT_FIRST = "; weights of PyTorch take diffdis import_weights first"
# In a folder of diffusers, of open_clip and of transformers, whose config has the name of a run's.
_OF_PYTORCH = ("model_index.json", "open_clip_config.json", "model.safetensors", "pytorch_model.bin")
KEPT = "kept_tokens"  # i32[n], the tokens whose vectors are there; the last row of each table is of all others
TABLES = ("tokens.embedding", "query_tokens.embedding")  # how the names of the tables of token vectors end
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


def read_record(path: pathlib.Path) -> Record:
  """Read what a file says, and none of its arrays. Raise UserError: it is damaged, or holds no run."""
  return _read(path)[0]


def check(path: pathlib.Path, step: int | None, *, ema: bool) -> Record:
  """Read what a file says. Raise UserError: it lacks this step or the raw weights (not `ema`), or is damaged."""
  record = read_record(path)
  if step not in (None, record.step):
    raise UserError(f"no checkpoint {step} in {path}, which holds that of step {record.step} alone")
  if record.ema and not ema:
    raise UserError(f"{path} holds averaged weights alone; leave --noema out")
  return record


def read_params(path: pathlib.Path) -> dict[str, Float32[np.ndarray, "..."]]:
  """Read the weights, f32, with every token's vector. Raise UserError: the file is damaged, or holds no run."""
  record, arrays = _read(path, arrays=True)
  kept = arrays.pop(KEPT, None)
  params = {name: array.astype(np.float32) for name, array in arrays.items()}
  if kept is not None:
    size = record.config["model"]["text_encoder"]["vocab_size"]
    for name in (name for name in arrays if name.endswith(TABLES)):
      table, params[name] = params[name], np.repeat(params[name][-1:], size, axis=0)
      params[name][kept] = table[:-1]
  return params


def _read(path: pathlib.Path, *, arrays: bool = False) -> tuple[Record, Arrays]:
  """Read the record and, if asked, all arrays, whose digest is compared."""
  try:
    with safe_open(path, "numpy") as file:
      text, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in (file.keys() if arrays else ())}
    if "run" not in text:
      raise UserError(f"{path} holds no run; it should be as export_weights wrote it{IMPORT_FIRST}")
    if arrays and digest(text["run"], tensors) != text.get("sha256"):
      raise ValueError("it holds other bytes than were written")
    return Record(**parse_json(text["run"], "its run")), tensors
  except (SafetensorError, OSError, TypeError, ValueError) as error:
    raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; copy it again") from error


def digest(run: str, arrays: Arrays) -> str:
  """Return the SHA-256 of the record and of every array, whatever their order in the file."""
  digest = hashlib.sha256(run.encode())
  for name, array in sorted(arrays.items()):
    digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
  return digest.hexdigest()
