"""Derives the `model` section of a checkpoint without config.json from the shapes of its tensors.

Head counts, groups and activations leave no trace there: they are Stable Diffusion v1's and published CLIPs'.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffdis_jax.errors import UserError
from diffdis_jax.interop.tensor_files import Tensors

UNET_HEADS, GROUPS = 8, 32
CLIP_HEAD_WIDTH = 64  # of every published text tower
MOST_VISION_HEADS = 16  # beyond ViT-L the heads of published vision towers are wider: 80 in ViT-H, 104 in ViT-bigG


def unet(tensors: Tensors, where: str) -> dict[str, Any]:
  """Return `model.unet`, from diffusers' names."""
  # Of the first level's blocks: all of them have the same number, in Stable Diffusion and here.
  levels, depth = _count(tensors, "down_blocks.#."), _count(tensors, "down_blocks.0.resnets.#.")
  return dict(
    widths=tuple(_shape(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", where)[0] for i in range(levels)),
    attention=tuple(f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in range(levels)),
    depth=depth,
    num_heads=UNET_HEADS,
    groups=GROUPS,
  )


def in_channels(tensors: Tensors, where: str) -> int:
  """Return the UNet's input channels, from diffusers' names."""
  return _shape(tensors, "conv_in.weight", where, axes=4)[1]


def vae(tensors: Tensors, where: str) -> dict[str, Any]:
  """Return `model.autoencoder` except its scale, from diffusers' names."""
  levels = _count(tensors, "encoder.down_blocks.#.")
  return dict(
    widths=tuple(_shape(tensors, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", where)[0] for i in range(levels)),
    depth=_count(tensors, "encoder.down_blocks.0.resnets.#."),
    latent_channels=_shape(tensors, "post_quant_conv.weight", where)[0],
    groups=GROUPS,
    attention="encoder.mid_block.attentions.0.to_q.weight" in tensors,
    patch=1,
    shift=0.0,
  )


def text(tensors: Tensors, where: str) -> dict[str, Any]:
  """Return `model.text_encoder` except its activation and projection, from transformers' names."""
  # Of the embeddings: layers have the width several times, in shapes that differ between towers.
  vocab_size, width = _shape(tensors, "text_model.embeddings.token_embedding.weight", where, axes=2)
  return dict(
    vocab_size=vocab_size,
    max_length=_shape(tensors, "text_model.embeddings.position_embedding.weight", where)[0],
    **_transformer(tensors, "text_model", width, where),
  )


def vision(tensors: Tensors, where: str) -> dict[str, Any]:
  """Return `model.vision_encoder` except its activation, from transformers' names."""
  width, _, patch, _ = _shape(tensors, "vision_model.embeddings.patch_embedding.weight", where, axes=4)
  # One for each patch of a square image, and the class token's.
  positions = _shape(tensors, "vision_model.embeddings.position_embedding.weight", where)[0]
  return dict(
    image_size=patch * round((positions - 1) ** 0.5),
    patch=patch,
    projection=_shape(tensors, "visual_projection.weight", where)[0],
    **_transformer(tensors, "vision_model", width, where, most_heads=MOST_VISION_HEADS),
  )


def _transformer(
  tensors: Tensors, tower: str, width: int, where: str, *, most_heads: int | None = None
) -> dict[str, Any]:
  heads = max(width // CLIP_HEAD_WIDTH, 1)
  return dict(
    width=width,
    depth=_count(tensors, f"{tower}.encoder.layers.#."),
    num_heads=min(heads, most_heads or heads),
    mlp_width=_shape(tensors, f"{tower}.encoder.layers.0.mlp.fc1.weight", where)[0],
  )


def _count(tensors: Tensors, pattern: str) -> int:
  """Count the indices in the place of `#`."""
  regex = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
  return len({match[1] for match in map(regex.match, tensors) if match})


def _shape(tensors: Tensors, name: str, where: str, *, axes: int | None = None) -> Sequence[int]:
  """Return a parameter's shape, of `axes` axes or else one or more. Raises UserError: another, or none."""
  if name not in tensors:
    raise UserError(f"{where} lacks parameter {name}; it is no whole checkpoint")
  shape = tensors[name].shape
  if not shape or 0 in shape or len(shape) != (axes or len(shape)):
    raise UserError(
      f"{where} has parameter {name} of shape {shape}, which no such network has; take another checkpoint"
    )
  return shape
