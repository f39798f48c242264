"""Map diffusers' names to the names of CompVis' single-file checkpoints: the inverse of diffusers' converter."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
OUTER = {
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "conv_in": "input_blocks.0.0",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
  "mid_block.resnets.0": "middle_block.0",
  "mid_block.attentions.0": "middle_block.1",
  "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, *, depth: int, has_attention: Mapping[int, bool]) -> str:
  """Return a UNet parameter's name in CompVis' file. The numbers of upsamplers depend on which levels attend."""
  if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
    direction, level, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = level * (depth + 1) + (direction == "down")
    side = "input_blocks" if direction == "down" else "output_blocks"
    if kind == "downsamplers":
      return f"{side}.{first + depth}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
      return f"{side}.{first + depth}.{1 + has_attention[level]}.{rest}"
    name = f"{side}.{first + i}.{int(kind == 'attentions')}.{rest}"
  for theirs, original in OUTER.items():
    if name.startswith(f"{theirs}."):
      name = original + name.removeprefix(theirs)
  if match := re.fullmatch(r"((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.(\w+)\.(\w+)", name):
    return f"{match[1]}.{RESNET.get(match[2], match[2])}.{match[3]}"
  return name


def vae_name(name: str, *, levels: int) -> str:
  for theirs, original in VAE_ATTENTION.items():
    name = name.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{original}.")
  name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
  name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
  name = re.sub(r"up_blocks\.(\d)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", name)
  name = (
    name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample").replace(".resnets.", ".block.")
  )
  return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def single_file(
  states: Mapping[str, Mapping[str, torch.Tensor]], *, depth: int, levels: int
) -> dict[str, torch.Tensor]:
  """Join three state dicts into one, in which the autoencoder's attention layers are 1x1 convolutions.

  Args:
    states: state dicts of unet, vae and text_encoder, the last with its prefix `text_model.`.
    depth: residual blocks a level of the UNet.
    levels: number of levels of the autoencoder.
  """
  names = list(states["unet"])
  has_attention = {level: f"up_blocks.{level}.attentions.0.norm.weight" in names for level in range(10)}
  file = {}
  for name, tensor in states["unet"].items():
    file[f"model.diffusion_model.{unet_name(name, depth=depth, has_attention=has_attention)}"] = tensor
  for name, tensor in states["vae"].items():
    name = vae_name(name, levels=levels)
    convolution = ".attn_1." in name and tensor.ndim == 2
    file[f"first_stage_model.{name}"] = tensor[:, :, None, None] if convolution else tensor
  return file | {f"cond_stage_model.transformer.{name}": tensor for name, tensor in states["text_encoder"].items()}
