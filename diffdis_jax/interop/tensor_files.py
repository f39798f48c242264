"""Read the tensors of PyTorch's weight files one by one: safetensors, .bin and .ckpt, whole or in shards.

A pickle is never executed: .bin and .ckpt are read by PyTorch's weights-only reader, which needs torch.
"""

from __future__ import annotations

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
  """A tensor in a file, which `read` loads in its dtype or in f32. `kind` names its numbers if they are no floats."""

  shape: tuple[int, ...]
  read: Callable[[], Shaped[np.ndarray, "..."]]
  kind: str = ""

  def map(self, f: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """Return f of this tensor, with the given shape, without reading it."""
    return Tensor(shape, lambda: f(self.read()), self.kind)


Tensors = dict[str, Tensor]

_FLOATS = ("F64", "F32", "F16", "BF16")  # the float dtypes of safetensors that numpy reads
_POINTER = b"version https://git-lfs."  # the content of a large file in a clone without git-lfs

HEAD = "head.safetensors"  # the head of a long-tailed run's second stage, for which libraries have no place

# A folder's file of weights, or the index of its shards: diffusion_pytorch_model.fp16.safetensors, model.safetensors,
# pytorch_model.bin.index.json, open_clip_pytorch_model.bin.
_ENTRY = re.compile(
  r"(?:diffusion_pytorch_model|open_clip_pytorch_model|open_clip_model|pytorch_model|model)"
  r"(?P<variant>\.\w+)?\.(?P<kind>safetensors|bin)(?P<index>\.index(?P<variant2>\.\w+)?\.json)?"
)
# Classes that training frameworks, also Stable Diffusion's, pickle beside the tensors of a checkpoint. The reader uses
# `_Discarded` in their place: nothing of them is imported or called.
_DISCARDED = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode")
_DISCARDED += ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
_DISCARDED += ("lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",)


class _Discarded:
  """Stand in for a value that is not a tensor."""

  def __init__(self, *args: Any):
    del args

  def __setstate__(self, state: Any) -> None:
    del state


def save(arrays: Mapping[str, Shaped[np.ndarray, "..."]], path: pathlib.Path) -> None:
  """Write a safetensors file as PyTorch's libraries do. Raises OSError: it cannot be written."""
  try:
    save_file(dict(arrays), path, metadata={"format": "pt"})
  except SafetensorError as error:
    number = full_disk(error)  # the error number of a full disk
    raise (OSError(str(error)) if number is None else OSError(number, os.strerror(number), str(path))) from error


def preferred(names: Iterable[str]) -> str | None:
  """Choose a folder's file of weights, or the index of its shards; None if there are none.

  Safetensors is preferred to .bin, full precision to a variant, and open_clip's file to timm's copy of the vision tower
  in the same repository.
  """
  ranked = []
  for match in filter(None, map(_ENTRY.fullmatch, names)):
    is_variant = bool(match["variant"] or match["variant2"])
    # The name decides between equals, so that the choice does not depend on the order in which a disk lists files.
    ranked.append((match["kind"] != "safetensors", is_variant, not match[0].startswith("open_"), match[0]))
  return min(ranked)[-1] if ranked else None


def open_folder(folder: pathlib.Path) -> Tensors:
  """Open the tensors of a folder's `preferred` file. Raises UserError: there is none, or as `open_file`."""
  name = preferred(path.name for path in folder.iterdir())
  if name is None:
    raise UserError(f"no weights in {folder}; it should hold a file such as diffusion_pytorch_model.safetensors")
  if not name.endswith(".json"):
    return open_file(folder / name)
  try:
    shards = {pathlib.Path(shard).name for shard in read_json(folder / name)["weight_map"].values()}
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(f"{folder / name} has no weight_map from tensors to files") from error
  return {name: tensor for shard in sorted(shards) for name, tensor in open_file(folder / shard).items()}


def open_file(path: pathlib.Path) -> Tensors:
  """Open the tensors of a .safetensors, .bin or .ckpt file without reading them. Raises UserError: the file is missing,
  broken, or a pickle that would need code execution."""
  if not path.is_file():
    raise UserError(f"no file {path}")
  with path.open("rb") as file:
    if file.read(len(_POINTER)) == _POINTER:  # the hint to copy the file again would be wrong
      raise UserError(f"{path} is a pointer of Git LFS, not the weights; type: git lfs pull in its repository")
  tensors = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
  # PyTorch's data-parallel training adds this prefix to each name.
  return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Read a JSON object. Raises UserError: the file is missing, or has another content."""
  content = files.read_json(path)
  if not isinstance(content, dict):
    raise UserError(f"{path} should be a JSON object, and holds a {type(content).__name__}")
  return content


def _open_safetensors(path: pathlib.Path) -> Tensors:
  tensors: Tensors = {}
  try:
    file = safe_open(path, framework="numpy")
    for name in file.keys():
      header = file.get_slice(name)
      # Check the header now: reading may take minutes before it reaches such a tensor.
      if re.match(r"F[4-8](_|$)", dtype := header.get_dtype()):
        raise UserError(f"{path} holds {name} as {dtype}, which numpy cannot read; convert it to F16, BF16 or F32")
      read = functools.partial(file.get_tensor, name)
      tensors[name] = Tensor(tuple(header.get_shape()), read, "" if dtype in _FLOATS else f"numbers of type {dtype}")
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is no whole safetensors file: {error}; copy it again") from error
  return tensors


def _open_torch(path: pathlib.Path) -> Tensors:
  try:
    import torch
  except ImportError as error:
    raise UserError(f"{path.suffix} files need torch: pip install torch, or convert {path} to safetensors") from error

  load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
  try:
    with torch.serialization.safe_globals([(_Discarded, name) for name in _DISCARDED]), warnings.catch_warnings():
      warnings.simplefilter("ignore")  # torch warns of a TorchScript archive, which is refused below
      try:
        content = load(mmap=True)
      except RuntimeError:  # a file of PyTorch before 1.6, which cannot be mapped, or a broken one
        content = load()
  except Exception as error:  # the instructions of a damaged pickle may raise anything
    if "TorchScript" in str(error):
      why = "is a TorchScript archive, a program; take open_clip's or transformers' files of the same model"
    elif type(error).__name__ == "UnpicklingError":
      reason = re.search(r"GLOBAL ([\w.]+)", str(error))
      what = f"it would call {reason[1]}" if reason else "it is more than tensors, or no file of PyTorch's"
      why = f"needs code execution to be read: {what}; pickles are never executed here"
    else:
      why = f"cannot be read as a PyTorch file: {' '.join(str(error).split())[:200]}; copy it again"
    raise UserError(f"{path} {why}") from error
  state = content.get("state_dict", content) if isinstance(content, dict) else None
  if not isinstance(state, dict):
    raise UserError(f"{path} holds no state dict, but a {type(content).__name__}")

  def kind(tensor: torch.Tensor) -> str:
    is_plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return "" if is_plain else f"numbers of type {tensor.dtype} ({tensor.layout}, on {tensor.device})"

  # The file is mapped: only tensors that `read` asks for are loaded, in f32, since numpy has no bf16.
  return {
    name: Tensor(tuple(tensor.shape), lambda tensor=tensor: tensor.detach().float().numpy(), kind(tensor))
    for name, tensor in state.items()
    if isinstance(tensor, torch.Tensor) and isinstance(name, str)
  }
