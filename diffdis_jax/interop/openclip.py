"""open_clip's state dicts in the names of transformers' CLIPModel. q, k and v are one tensor there."""

from __future__ import annotations

import re

from diffdis_jax.interop.tensor_files import Tensor, Tensors

MARK = "visual.conv1.weight"
"""A tensor that every one of them has."""

_NAMES = (
  (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
  (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
  (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
  (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
  (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
  (r"^visual\.proj$", "visual_projection.weight"),
  (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
  (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
  (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
  (r"^ln_final\.", "text_model.final_layer_norm."),
  (r"^text_projection$", "text_projection.weight"),
  (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
  (r"(layers\.\d+)\.ln_([12])\.", r"\1.layer_norm\2."),
  (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
  (r"(layers\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
  (r"(layers\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)


def convert(tensors: Tensors) -> Tensors:
  """The same tensors as CLIPModel has them: the projections transposed, q, k and v apart."""
  converted: Tensors = {}
  for name, tensor in tensors.items():
    for pattern, replacement in _NAMES:
      name = re.sub(pattern, replacement, name)
    if name in ("visual_projection.weight", "text_projection.weight") and len(tensor.shape) == 2:
      tensor = tensor.map(lambda x: x.T, tensor.shape[::-1])
    if match := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name):
      parts = {f"{match[1]}.{part}_proj.{match[2]}": _third(tensor, i) for i, part in enumerate("qkv")}
    else:
      parts = {name: tensor}
    converted |= parts
  return converted


def _third(fused: Tensor, i: int) -> Tensor:
  size = fused.shape[0] // 3
  return fused.map(lambda x: x[i * size : (i + 1) * size], (size, *fused.shape[1:]))
