"""Reads tensors of PyTorch users' weight files one by one: safetensors, .bin and .ckpt, whole or in shards.

A pickle is never executed: .bin and .ckpt go through PyTorch's weights-only reader, which takes torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffdis_jax.common import files
from diffdis_jax.errors import UserError, full_disk


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file. `read` loads it, in the file's dtype or in f32.

  Attributes:
    kind: what it has in the place of floats, one by one, such as whole numbers; empty where it has these.
  """

  shape: tuple[int, ...]
  read: Callable[[], Shaped[np.ndarray, "..."]]
  kind: str = ""

  def map(self, f: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """Return f of this tensor, of the given shape, still unread."""
    return Tensor(shape, lambda: f(self.read()), self.kind)


Tensors = dict[str, Tensor]

_FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors' dtypes those that numpy reads
_POINTER = b"version https://git-lfs."  # what a clone without git-lfs has in the place of a large file

HEAD = "head.safetensors"  # of a long-tailed run's second stage, beside what libraries read; none has a place for it


def save(arrays: Mapping[str, Shaped[np.ndarray, "..."]], path: pathlib.Path) -> None:
  """Write a safetensors file as PyTorch's libraries do. Raises OSError: it cannot be written."""
  try:
    save_file(dict(arrays), path, metadata={"format": "pt"})
  except SafetensorError as error:
    # By its number a full disk is known for what it is.
    number = full_disk(error)
    raise (OSError(str(error)) if number is None else OSError(number, os.strerror(number), str(path))) from error


# A folder's file of weights, or the index of its shards: diffusion_pytorch_model.fp16.safetensors, model.safetensors,
# pytorch_model.bin.index.json, open_clip_pytorch_model.bin.
_ENTRY = re.compile(
  r"(?:diffusion_pytorch_model|open_clip_pytorch_model|open_clip_model|pytorch_model|model)"
  r"(?P<variant>\.\w+)?\.(?P<kind>safetensors|bin)(?P<index>\.index(?P<variant2>\.\w+)?\.json)?"
)

# What training frameworks leave in a checkpoint beside its tensors, Stable Diffusion's own included. The reader takes
# these names for `_Discarded`: nothing of theirs is imported or called.
_DISCARDED = (
  "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
  "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
  "numpy.core.multiarray.scalar",
  "numpy._core.multiarray.scalar",
  "numpy.dtype",
  "_codecs.encode",
)


class _Discarded:
  """Stands for a value that is not a tensor."""

  def __init__(self, *args: Any):
    del args

  def __setstate__(self, state: Any) -> None:
    del state


def preferred(names: Iterable[str]) -> str | None:
  """Choose the file in a folder whose weights are read, or the index of its shards; None if there are none.

  Safetensors rather than .bin, full precision rather than a variant, open_clip's own file rather than timm's copy of
  the vision tower, which its repositories hold too.
  """
  entries = filter(None, map(_ENTRY.fullmatch, names))
  # By name at last, so that of two such files each machine takes the same one, whatever order its disk lists them in.
  ranked = [
    (each["kind"] != "safetensors", bool(each["variant"] or each["variant2"]), not each[0].startswith("open_"), each[0])
    for each in entries
  ]
  return min(ranked)[-1] if ranked else None


def open_folder(folder: pathlib.Path) -> Tensors:
  """Open the tensors of one model's folder, those of its `preferred` file.

  Raises:
    UserError: no weights there, a shard missing, or a file that `open_file` refuses.
  """
  found = preferred(path.name for path in folder.iterdir())
  if not found:
    raise UserError(f"no weights in {folder}; it should hold a file such as diffusion_pytorch_model.safetensors")
  if not found.endswith(".json"):
    return open_file(folder / found)
  tensors: Tensors = {}
  for name in sorted(set(_read_index(folder / found).values())):
    tensors |= open_file(folder / pathlib.Path(name).name)
  return tensors


def open_file(path: pathlib.Path) -> Tensors:
  """Open the tensors of a .safetensors, .bin or .ckpt file, unread.

  Raises:
    UserError: no such file, one that is cut short or otherwise broken, or a pickle that would need code execution.
  """
  if not path.is_file():
    raise UserError(f"no file {path}")
  with contextlib.suppress(OSError), path.open("rb") as file:  # the readers below say what cannot be read
    if file.read(len(_POINTER)) == _POINTER:  # copied again, it would be one again
      raise UserError(f"{path} is a pointer of Git LFS, not the weights; type: git lfs pull in its repository")
  return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Read a JSON object.

  Raises:
    UserError: no such file, or another content.
  """
  content = files.read_json(path)
  if not isinstance(content, dict):
    raise UserError(f"{path} should be a JSON object, and holds a {type(content).__name__}")
  return content


def _read_index(path: pathlib.Path) -> dict[str, str]:
  files = read_json(path).get("weight_map")
  if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
    raise UserError(f"{path} has no weight_map from tensors to files")
  return files


def _open_safetensors(path: pathlib.Path) -> Tensors:
  try:
    file = safe_open(path, framework="numpy")
    slices = {name: file.get_slice(name) for name in file.keys()}
    # Now, by the header: at the first tensor that is read, the others may have taken minutes.
    for name, each in slices.items():
      if re.match(r"F[4-8](_|$)", dtype := each.get_dtype()):
        raise UserError(f"{path} holds {name} as {dtype}, which numpy cannot read; convert it to F16, BF16 or F32")
    kinds = {name: each.get_dtype() for name, each in slices.items()}
    return {
      name: Tensor(
        tuple(each.get_shape()),
        functools.partial(file.get_tensor, name),
        "" if kinds[name] in _FLOATS else f"numbers of type {kinds[name]}",
      )
      for name, each in slices.items()
    }
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is no whole safetensors file: {error}; copy it again") from error


def _open_torch(path: pathlib.Path) -> Tensors:
  try:
    import torch
  except ImportError as error:
    raise UserError(f"{path.suffix} files need torch: pip install torch, or convert {path} to safetensors") from error

  load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
  try:
    with torch.serialization.safe_globals([(_Discarded, name) for name in _DISCARDED]), warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of a TorchScript archive, which is then refused
      try:
        content = load(mmap=True)
      except RuntimeError:  # a file from before PyTorch 1.6, which cannot be mapped, or a broken one
        content = load()
  except Exception as error:  # of a damaged file, whatever its instructions do
    if type(error).__name__ == "UnpicklingError":
      reason = re.search(r"GLOBAL ([\w.]+)", str(error))
      what = f"it would call {reason[1]}" if reason else "it is more than tensors, or no file of PyTorch's"
      raise UserError(f"{path} needs code execution to be read: {what}; pickles are never executed here") from error
    if "TorchScript" in str(error):
      raise UserError(
        f"{path} is a TorchScript archive, a program; take open_clip's or transformers' files of the same CLIP, or"
        " torch-fidelity's or pytorch-fid's of FID's Inception"
      ) from error
    raise UserError(f"{path} cannot be read as a PyTorch file: {str(error)[:200]}; copy it again") from error
  state = content.get("state_dict", content) if isinstance(content, dict) else None
  if not isinstance(state, dict):
    raise UserError(f"{path} holds no state dict, but a {type(content).__name__}")
  # Mapped, not loaded: only what `read` asks for comes into memory. In f32, since numpy has no bf16 of its own.
  return {
    name: Tensor(tuple(tensor.shape), lambda tensor=tensor: tensor.detach().float().numpy(), _kind(tensor))
    for name, tensor in state.items()
    if isinstance(tensor, torch.Tensor) and isinstance(name, str)
  }


def _kind(tensor: Any) -> str:
  """Return `Tensor.kind` of a tensor of PyTorch."""
  if tensor.is_meta:
    return "no numbers"
  if (layout := str(tensor.layout)) != "torch.strided":
    return f"numbers in the layout {layout}"
  return "" if tensor.is_floating_point() else f"numbers of type {tensor.dtype}"
