"""Weights between the PyTorch implementations (diffusers, transformers) and ours, by one table of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# Our path to PyTorch's name: every rule is applied, in this order.
NAMES = (
  (r"^unet\.", ""),
  (r"^text_encoder\.layers", "encoder.layers"),
  (r"^text_encoder\.tokens\.embedding", "embeddings.token_embedding.weight"),
  (r"^text_encoder\.positions", "embeddings.position_embedding.weight"),
  (r"^text_encoder\.norm", "final_layer_norm"),
  (r"^text_encoder\.projection", "text_projection"),
  (r"^autoencoder\.conv_in", "encoder.conv_in"),
  (r"^autoencoder\.encoder_(norm|out)", r"encoder.conv_\1"),
  (r"^autoencoder\.decoder_in", "decoder.conv_in"),
  (r"^autoencoder\.decoder_norm", "decoder.conv_norm"),
  (r"^autoencoder\.conv_out", "decoder.conv_out"),
  (r"^autoencoder\.(en|de)coder_middle\.attention\.norm", r"\1coder.mid_block.attentions.0.group_norm"),
  (r"^autoencoder\.(en|de)coder_middle\.attention\.attn", r"\1coder.mid_block.attentions.0"),
  (r"^autoencoder\.(en|de)coder_middle", r"\1coder.middle"),
  (r"^autoencoder\.down\.(\d)\.resample", r"encoder.down.\1.downsamplers.0"),
  (r"^autoencoder\.up\.(\d)\.resample", r"decoder.up.\1.upsamplers.0"),
  (r"^autoencoder\.down", "encoder.down"),
  (r"^autoencoder\.up", "decoder.up"),
  (r"^autoencoder\.(post_quant|quant)", r"\1_conv"),
  (r"(encoder\.layers\.\d+)\.norm(\d)", r"\1.layer_norm\2"),
  (r"(encoder\.layers\.\d+)\.attn\.(\w+)", r"\1.self_attn.\2_proj"),
  (r"(^|\.)(down|up)\.(\d)", r"\1\2_blocks.\3"),
  (r"downsample\.", "downsamplers.0."),
  (r"upsample\.", "upsamplers.0."),
  (r"middle\.resnet1", "mid_block.resnets.0"),
  (r"middle\.resnet2", "mid_block.resnets.1"),
  (r"middle\.attention", "mid_block.attentions.0"),
  (r"\.block\.", ".transformer_blocks.0."),
  (r"ff\.proj", "ff.net.0.proj"),
  (r"ff\.out", "ff.net.2"),
  (r"(attn\d|attentions\.0)\.([qkv])\.", r"\1.to_\2."),
  (r"(attn\d|attentions\.0)\.out\.", r"\1.to_out.0."),
  (r"^time\.fc", "time_embedding.linear_"),
  (r"\.time\.", ".time_emb_proj."),
  (r"shortcut", "conv_shortcut"),
  (r"^norm_out|conv_norm(?=\.)", "conv_norm_out"),
  (r"norm\.(scale|bias)$", r"\1"),
  (r"\.\.", "."),
  (r"\.(kernel|scale)$", ".weight"),
)


def torch_name(path: str) -> str:
  for pattern, replacement in NAMES:
    path = re.sub(pattern, replacement, path)
  return path


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Norms that are not the identity, biases that are not zero, weights that keep outputs near unit scale."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        noise = noise if "embedding.weight" in name else noise / parameter[0].numel() ** 0.5
      else:
        noise = 0.2 * noise + name.endswith("weight")
      parameter.copy_(noise)
  return module.eval()


def to_ours(module: torch.nn.Module, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Values of `shapes`' parameters from `module`; every parameter of `module` is used."""
  values = {name: value.detach().numpy() for name, value in module.named_parameters()}
  names = {path: torch_name(path) for path in shapes}
  assert sorted(names.values()) == sorted(values)
  params = {}
  for path, name in names.items():
    value = values[name]
    if path.endswith("kernel"):
      value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    assert value.shape == shapes[path].shape, path
    params[path] = np.asarray(value, np.float32)
  return params


def nchw(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
  return np.moveaxis(x.detach().numpy(), 1, -1)
