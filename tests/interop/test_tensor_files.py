from __future__ import annotations

import errno
import json
import os
import pathlib
import pickle
import subprocess
import sys
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from diffdis_jax.errors import UserError
from diffdis_jax.interop import tensor_files
from diffdis_jax.interop.tensor_files import Tensors

VALUES = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asarray(2.5, np.float32)}


def assert_values(tensors: Tensors, names: tuple[str, ...] = ("a.weight", "b")) -> None:
  assert sorted(tensors) == sorted(names)
  for name in names:
    assert tensors[name].shape == VALUES[name].shape
    np.testing.assert_array_equal(tensors[name].read().astype(np.float32), VALUES[name])


def as_torch() -> dict[str, torch.Tensor]:
  return {name: torch.from_numpy(np.array(value)) for name, value in VALUES.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_safetensors_file_is_read(tmp_path, dtype):
  save_file({name: value.astype(dtype) for name, value in VALUES.items()}, tmp_path / "x.safetensors")
  tensors = tensor_files.open_file(tmp_path / "x.safetensors")
  assert tensors["a.weight"].read().dtype == dtype
  assert_values(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zipped, nested", [(True, True), (False, False)])
def test_a_pickle_of_tensors_is_read(tmp_path, dtype, zipped, nested):
  state = {name: tensor.to(dtype) for name, tensor in as_torch().items()}
  content = {"state_dict": state, "epoch": 3} if nested else {**state, "step": 7}
  torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
  assert_values(tensor_files.open_file(tmp_path / "x.ckpt"))


class Malicious:
  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_executed(tmp_path, zipped):
  state = {**as_torch(), "x": Malicious(tmp_path / "folder")}
  torch.save(state, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
  with pytest.raises(UserError, match=r"needs code execution .* it would call \w+\.mkdir;") as error:
    tensor_files.open_file(tmp_path / "x.ckpt")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2], protocol=2)])
def test_a_file_without_tensors_is_refused(tmp_path, content):
  (tmp_path / "x.bin").write_bytes(content)
  with pytest.raises(UserError, match=r"x\.bin"):
    tensor_files.open_file(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit warns
def test_a_torchscript_archive_is_named(tmp_path):
  torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-32.pt")
  with pytest.raises(UserError, match=r"ViT-B-32.pt is a TorchScript archive, .*; take open_clip's or transformers'"):
    tensor_files.open_file(tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
  """A clone without git-lfs contains a pointer instead of the weights."""
  (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3438167534\n")
  with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS, not the weights; type: git lfs pull"):
    tensor_files.open_file(tmp_path / name)


@pytest.mark.parametrize("name, size", [("x.safetensors", 0.1), ("x.safetensors", 0.9), ("x.ckpt", 0.9)])
def test_a_file_that_is_cut_short_is_refused(tmp_path, name, size):
  path = tmp_path / name
  big = np.zeros((100, 100), np.float32)
  save_file({"a": big}, path) if name == "x.safetensors" else torch.save({"a": torch.from_numpy(big)}, path)
  content = path.read_bytes()
  path.write_bytes(content[: int(size * len(content))])
  with pytest.raises(UserError, match=rf"{name} (is no whole|cannot be read).*; copy it again"):
    tensor_files.open_file(path)


def test_a_full_disk_raises_its_error_number(tmp_path, monkeypatch):
  """The launcher recognises a full disk by its error number, and retries."""
  error = SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
  monkeypatch.setattr(tensor_files, "save_file", mock.Mock(side_effect=error))
  with pytest.raises(OSError, match="No space left") as raised:
    tensor_files.save({}, tmp_path / "x.safetensors")
  assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "x.safetensors"))


def test_reading_a_pickle_without_torch_names_torch(tmp_path):
  torch.save(as_torch(), tmp_path / "x.bin")
  code = (
    "import sys, pathlib; sys.modules['torch'] = None; from diffdis_jax.interop import tensor_files\n"
    f"tensor_files.open_file(pathlib.Path({str(tmp_path / 'x.bin')!r}))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert "UserError: .bin files need torch: pip install torch, or convert" in done.stderr


def write(folder: pathlib.Path, *names: str, content: dict[str, np.ndarray] = VALUES) -> None:
  for name in names:
    if name.endswith(".safetensors"):
      save_file(content, folder / name)
    else:
      torch.save({key: torch.from_numpy(np.array(value)) for key, value in content.items()}, folder / name)


@pytest.mark.parametrize(
  "best, others",
  [
    ("diffusion_pytorch_model.safetensors", ("diffusion_pytorch_model.fp16.safetensors", "pytorch_model.bin")),
    ("model.fp16.safetensors", ("pytorch_model.bin",)),
    ("pytorch_model.bin", ("pytorch_model.fp16.bin",)),
    ("open_clip_model.safetensors", ("other.safetensors", "model.safetensors")),  # timm's copy of the vision tower
  ],
)
def test_the_best_file_of_a_folder_is_read(tmp_path, best, others):
  write(tmp_path, best)
  write(tmp_path, *others, content={"wrong": np.zeros(1, np.float32)})
  assert_values(tensor_files.open_folder(tmp_path))


@pytest.mark.parametrize(
  "index, shards",
  [
    ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin"),
  ],
)
def test_shards_are_read_by_their_index(tmp_path, index, shards):
  for i, (name, value) in enumerate(VALUES.items(), start=1):
    write(tmp_path, shards.format(i), content={name: value})
  files = {name: shards.format(i) for i, name in enumerate(VALUES, start=1)}
  (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
  assert_values(tensor_files.open_folder(tmp_path))
  (tmp_path / shards.format(2)).unlink()
  with pytest.raises(UserError, match="no file .*00002-of-00002"):
    tensor_files.open_folder(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(tmp_path, content):
  (tmp_path / "model.safetensors.index.json").write_text(content)
  with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
    tensor_files.open_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
  with pytest.raises(UserError, match="no weights in .*diffusion_pytorch_model.safetensors"):
    tensor_files.open_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4"])
def test_a_dtype_that_numpy_lacks_is_refused_in_one_line(tmp_path, dtype):
  header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 2 if dtype == "F4" else 4]}}).encode()
  file = tmp_path / "model.safetensors"
  file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 if dtype == "F4" else 4))
  with pytest.raises(UserError, match=f"holds a as {dtype}, which numpy cannot read; convert it to F16, BF16 or F32"):
    tensor_files.open_file(file)


@pytest.mark.parametrize("content", ['{"a":' * 20_000, "[1]"])
def test_a_config_that_is_no_object_is_refused_in_one_line(tmp_path, content):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(UserError, match="config.json (is not JSON|should be a JSON object)"):
    tensor_files.read_json(tmp_path / "config.json")
