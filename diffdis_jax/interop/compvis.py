"""Translate the names of single-file Stable Diffusion v1 checkpoints, written by CompVis' code, to diffusers' names.

CompVis numbers the blocks from first to last, and diffusers by level.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from diffdis_jax.interop.tensor_files import Tensors

# Component -> its prefix in the file.
PREFIXES = {
  "unet": "model.diffusion_model.",
  "vae": "first_stage_model.",
  "text_encoder": "cond_stage_model.transformer.",
}

# Replacements in names. Every rule is applied, at any place of a name.
_UNET_PARTS = (
  (r"^time_embed\.0\.", "time_embedding.linear_1."),
  (r"^time_embed\.2\.", "time_embedding.linear_2."),
  (r"^input_blocks\.0\.0\.", "conv_in."),
  (r"^out\.0\.", "conv_norm_out."),
  (r"^out\.2\.", "conv_out."),
  (r"^middle_block\.0\.", "mid_block.resnets.0."),
  (r"^middle_block\.1\.", "mid_block.attentions.0."),
  (r"^middle_block\.2\.", "mid_block.resnets.1."),
  (r"\.in_layers\.0\.", ".norm1."),
  (r"\.in_layers\.2\.", ".conv1."),
  (r"\.emb_layers\.1\.", ".time_emb_proj."),
  (r"\.out_layers\.0\.", ".norm2."),
  (r"\.out_layers\.3\.", ".conv2."),
  (r"\.skip_connection\.", ".conv_shortcut."),
)
_UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d)\.(op\.|conv\.)?(.+)")
_VAE_PARTS = (
  (r"\.block\.", ".resnets."),
  (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
  (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
  (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
  (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
  (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
  (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
  (r"\.nin_shortcut\.", ".conv_shortcut."),
  (r"^(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
)


def split(tensors: Tensors) -> tuple[dict[str, Tensors], list[str]]:
  """Split a single file's tensors by component, with diffusers' names, and list the names of the others."""
  components: dict[str, Tensors] = {
    component: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for component, prefix in PREFIXES.items()
  }
  others = [name for name in tensors if not name.startswith(tuple(PREFIXES.values()))]
  depth = unet_depth(components["unet"])
  levels = len({name.split(".")[2] for name in components["vae"] if name.startswith("decoder.up.")})
  components["unet"] = {unet_name(name, depth=depth): tensor for name, tensor in components["unet"].items()}
  components["vae"] = {vae_name(name, levels=levels): tensor for name, tensor in components["vae"].items()}
  return components, others


def unet_depth(names: Collection[str]) -> int:
  """Count the residual blocks of a level of the down path, from the UNet's names in the file."""
  # A level has residual blocks and a downsampling block, which the last level lacks. The first convolution is one more
  # block, so that the number of blocks is a multiple of the number of levels.
  blocks = {name.split(".")[1] for name in names if name.startswith("input_blocks.")}
  levels = 1 + len({name.split(".")[1] for name in names if re.match(r"input_blocks\.\d+\.0\.op\.", name)})
  return max(len(blocks) // levels - 1, 1)


def unet_name(name: str, *, depth: int) -> str:
  """Return diffusers' name of a parameter of the UNet.

  `input_blocks.0` is the first convolution. The last block of a level's down path is its downsampling. An upsampling is
  the last part of its block of the up path.
  """
  for pattern, replacement in _UNET_PARTS:
    name = re.sub(pattern, replacement, name)
  match = _UNET_BLOCK.fullmatch(name)
  if not match:
    return name
  way, block, slot, resampling, rest = match.groups()
  level, i = divmod(int(block) - (way == "input"), depth + 1)
  side = "down" if way == "input" else "up"
  # Part 1 of a block is attention, or the upsampling if the level has none; `op` or `conv` marks a resampling.
  if resampling:
    return f"{side}_blocks.{level}.{side}samplers.0.conv.{rest}"
  return f"{side}_blocks.{level}.{'resnets' if slot == '0' else 'attentions'}.{i}.{rest}"


def vae_name(name: str, *, levels: int) -> str:
  """Return diffusers' name of a parameter of the autoencoder. Its decoder counts levels from the latent on."""
  for pattern, replacement in _VAE_PARTS:
    name = re.sub(pattern, replacement, name)
  name = re.sub(r"^encoder\.down\.", "encoder.down_blocks.", name)
  return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}", name)
