"""Test that a checkpoint with a wrong tensor or config is refused in one line that names it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from diffdis_jax import import_weights
from diffdis_jax.errors import UserError
from diffdis_jax.interop import from_torch, tensor_files

LAYER = "transformer.resblocks.0.mlp.c_fc.weight"
SHAPES = {
  "visual.class_embedding": (64,),
  "visual.positional_embedding": (5, 64),
  "visual.conv1.weight": (64, 3, 8, 8),
  "visual.proj": (64, 32),
  f"visual.{LAYER}": (256, 64),
  LAYER: (256, 64),
  "transformer.resblocks.0.attn.in_proj_weight": (192, 64),
  "token_embedding.weight": (49408, 64),
  "positional_embedding": (77, 64),
  "text_projection": (64, 32),
}


def write(folder: pathlib.Path, config: Any = None, dtype: Any = np.float32, **shapes: Any) -> pathlib.Path:
  """Write a folder in open_clip's layout, and return it."""
  folder.mkdir(exist_ok=True)
  arrays = {name: np.zeros(shape, dtype) for name, shape in {**SHAPES, **shapes}.items()}
  save_file(arrays, folder / "open_clip_model.safetensors")
  (folder / "open_clip_config.json").write_text(json.dumps(config or {"model_cfg": {}}))
  return folder


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    ("visual.conv1.weight", (64, 192)),
    ("visual.positional_embedding", (0, 64)),
    ("visual.proj", ()),
    ("token_embedding.weight", (49408,)),
  ],
)
def test_a_tensor_of_another_rank_is_refused(tmp_path, name, shape):
  with pytest.raises(UserError, match="is no whole checkpoint of such a network"):
    from_torch.open_source(write(tmp_path, **{name: shape}))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantized_weights_are_refused(tmp_path, dtype):
  """Quantized weights have no meaning without their scales, which are other tensors."""
  shapes = {"text_encoder.tokens.embedding": jax.ShapeDtypeStruct((49408, 64), np.float32)}
  match = lambda dtype: from_torch.match(from_torch.open_source(write(tmp_path, dtype=dtype)), shapes)
  with pytest.raises(UserError, match=r"clip parameter \S+ holds numbers of type [IU]8, as quantized weights do"):
    match(dtype)
  match(np.float16)


def test_a_prefix_of_data_parallel_training_is_removed(tmp_path):
  """PyTorch's data-parallel training adds the prefix `module.` to each name."""
  write(tmp_path / "one")
  (tmp_path / "several").mkdir()
  arrays = {f"module.{name}": np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
  save_file(arrays, tmp_path / "several" / "open_clip_model.safetensors")
  (tmp_path / "several" / "open_clip_config.json").write_text('{"model_cfg": {}}')
  single, several = (from_torch.open_source(tmp_path / name) for name in ("one", "several"))
  assert single.components["clip"].keys() == several.components["clip"].keys() and single.model == several.model


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
  ("tensor", "kind"),
  [
    (lambda: torch.eye(3).to_sparse(), r"numbers of type torch.float32 \(torch.sparse_coo, on cpu\)"),
    (lambda: torch.zeros(3, dtype=torch.int8), "numbers of type torch.int8 "),
    (lambda: torch.zeros(3, device="meta"), r"numbers of type torch.float32 \(torch.strided, on meta\)"),
    (lambda: torch.zeros(3, dtype=torch.bfloat16), ""),
  ],
)
def test_tensors_of_pytorch_that_are_no_floats_are_described(tmp_path, tensor, kind):
  torch.save({"a": tensor(), 0: torch.zeros(1)}, tmp_path / "x.bin")
  tensors = tensor_files.open_file(tmp_path / "x.bin")
  assert [*tensors] == ["a"] and (re.match(kind, tensors["a"].kind) if kind else not tensors["a"].kind)


@pytest.mark.parametrize(
  ("file", "content", "message"),
  [
    ("config.json", {"text_config": "x"}, "config.json: text_config is 'x'; it should be an object"),
    ("config.json", {"projection_dim": "x"}, "config.json: projection_dim is 'x'; it should be a number"),
    ("preprocessor_config.json", {"image_mean": ["a", "b", "c"]}, r"mean is \['a', 'b', 'c'\]; only OpenAI's"),
  ],
)
def test_a_config_of_transformers_with_wrong_values_is_refused(tmp_path, file, content, message):
  write(tmp_path)
  for name in {"config.json", file}:
    (tmp_path / name).write_text(json.dumps({"model_type": "clip", **(content if name == file else {})}))
  with pytest.raises(UserError, match=message):
    from_torch.open_source(tmp_path)


@pytest.mark.parametrize(
  "content",
  [
    {"model": {"vocab": {}}, "added_tokens": [{"x": 1}]},
    {"model": {"vocab": [["a", 1]]}, "added_tokens": []},
    {"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": [1], "id": 2}]},
  ],
)
def test_a_tokenizer_of_another_form_is_refused(tmp_path, content):
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match="tokenizer.json is not CLIP's vocabulary"):
    import_weights.check_tokenizer(tmp_path)


@pytest.mark.parametrize(
  ("channels", "message"), [(9, "in_channels is 9; Stable Diffusion v1 and this package have 4"), (4, "")]
)
def test_a_single_file_for_inpainting_is_refused(tmp_path, channels, message):
  block, text = (32, 32, 3, 3), "cond_stage_model.transformer.text_model"
  shapes = {
    "model.diffusion_model.input_blocks.0.0.weight": (32, channels, 3, 3),
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": block,
    "first_stage_model.encoder.down.0.block.0.conv1.weight": block,
    "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
    f"{text}.embeddings.token_embedding.weight": (49408, 4),
    f"{text}.embeddings.position_embedding.weight": (77, 4),
    f"{text}.encoder.layers.0.mlp.fc1.weight": (8, 4),
  }
  save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, tmp_path / "v1.safetensors")
  with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
    from_torch.open_source(tmp_path / "v1.safetensors")
