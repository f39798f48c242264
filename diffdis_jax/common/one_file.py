"""Read a run in one safetensors file: its config, one set of its weights, and their provenance. No jax.

Such a file, FILE.safetensors or the name of one in `diffdis_jax/shipped`, may be given wherever a workdir is read.
interop/packed.py writes it. One embedding may replace those of all tokens that never occurred in training.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 for numpy, and so for safetensors
import numpy as np
from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, safe_open

from diffdis_jax.errors import UserError, parse_json

SUFFIX = ".safetensors"
IMPORT_FIRST = "; weights of PyTorch take diffdis import_weights first"
# Files in folders of diffusers, open_clip and transformers; transformers' config has the name of a run's config.
_OF_PYTORCH = ("model_index.json", "open_clip_config.json", "model.safetensors", "pytorch_model.bin")
KEPT = "kept_tokens"  # i32[n], the tokens that have their own vectors; the last row of each table is for all others
TABLES = ("tokens.embedding", "query_tokens.embedding")  # how the names of the tables of token vectors end
Arrays = dict[str, Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """The description of the weights in a file.

  Attributes:
    config: the run's config, as in its config.json.
    step: step of the checkpoint.
    ema: True if the weights are averaged.
    provenance: of the run (run/provenance.py).
    licences: licences of the training data, as text; empty if there are none.
    initialised: weights of an import that are random; a run that starts from here samples them by its own seed.
    results: what evaluate measured for these weights: {file: {task: {data set: record}}}.
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
  """Return the file that a path or a name stands for, or None for a workdir. A folder with this name is a workdir."""
  given = os.fspath(workdir)
  if given.endswith(SUFFIX) and os.path.isfile(given):
    return pathlib.Path(given)
  return None if os.path.exists(given) else models().get(given)


def meant(given: str | os.PathLike[str]) -> str:
  """Suggest what a path that is no workdir may mean: PyTorch weights, a run below the folder, or a trained model with a
  similar name. Return an empty text if nothing fits."""
  path = pathlib.Path(given)
  if path.is_file() or any((path / name).is_file() for name in _OF_PYTORCH):
    return IMPORT_FIRST
  if below := sorted(file.parent for deep in ("*", "runs/*") for file in path.glob(f"{deep}/config.json")):
    return f"; below it is {below[0]}"
  near = difflib.get_close_matches(os.fspath(given), models(), n=1)
  return f"; did you mean {near[0]}?" if near else ""


def read_record(path: pathlib.Path) -> Record:
  """Read a file's record, without its arrays. Raise UserError: it is damaged, or has no run."""
  return _read(path)[0]


def check(path: pathlib.Path, step: int | None, *, ema: bool) -> Record:
  """Read a file's record. Raise UserError: it lacks this step or (unless `ema`) the raw weights, or is damaged."""
  record = read_record(path)
  if step not in (None, record.step):
    raise UserError(f"no checkpoint {step} in {path}, which holds that of step {record.step} alone")
  if record.ema and not ema:
    raise UserError(f"{path} holds averaged weights alone; leave --noema out")
  return record


def read_params(path: pathlib.Path) -> dict[str, Float32[np.ndarray, "..."]]:
  """Read the weights in f32, with every token's vector. Raise UserError: the file is damaged, or has no run."""
  record, arrays = _read(path, arrays=True)
  kept_tokens = arrays.pop(KEPT, None)
  params = {name: array.astype(np.float32) for name, array in arrays.items()}
  if kept_tokens is not None:
    size = record.config["model"]["text_encoder"]["vocab_size"]
    for name in (name for name in arrays if name.endswith(TABLES)):
      table, params[name] = params[name], np.repeat(params[name][-1:], size, axis=0)
      params[name][kept_tokens] = table[:-1]
  return params


def _read(path: pathlib.Path, *, arrays: bool = False) -> tuple[Record, Arrays]:
  """Read the record and, if asked, all arrays, and compare their digest."""
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
  """Return the SHA-256 of the record and of all arrays, independent of their order in the file."""
  digest = hashlib.sha256(run.encode())
  for name, array in sorted(arrays.items()):
    digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
  return digest.hexdigest()
