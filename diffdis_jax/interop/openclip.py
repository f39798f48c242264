"""Convert open_clip's state dicts and configs to those of transformers' CLIPModel, and back.

In open_clip q, k and v are one tensor, and the two projections are transposed. Only its class CLIP is supported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from diffdis_jax.errors import UserError
from diffdis_jax.interop.sections import CLIP_HEAD_WIDTH, unsupported
from diffdis_jax.interop.tensor_files import Tensors
from diffdis_jax.models.clip import PIXEL_MEAN, PIXEL_STD

MARK = "visual.conv1.weight"  # a tensor of every vision transformer of open_clip
SUPPORTED = "open_clip's own vision transformer and text transformer are supported, such as ViT-B-32 and ViT-L-14"
# (open_clip's name or its beginning, the name in transformers). The first match counts.
_TOWERS = (
  ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
  ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
  ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
  ("visual.ln_pre.", "vision_model.pre_layrnorm."),
  ("visual.ln_post.", "vision_model.post_layernorm."),
  ("visual.proj", "visual_projection.weight"),
  ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
  ("token_embedding.", "text_model.embeddings.token_embedding."),
  ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
  ("ln_final.", "text_model.final_layer_norm."),
  ("text_projection", "text_projection.weight"),
  ("transformer.resblocks.", "text_model.encoder.layers."),
)
_LAYERS = (
  (".ln_1.", ".layer_norm1."),
  (".ln_2.", ".layer_norm2."),
  (".attn.", ".self_attn."),
  (".mlp.c_fc.", ".mlp.fc1."),
  (".mlp.c_proj.", ".mlp.fc2."),
)
_PROJECTIONS = ("visual_projection.weight", "text_projection.weight")


def convert(tensors: Tensors) -> Tensors:
  """Return the tensors of CLIPModel: transpose the projections, and split q, k and v."""
  converted: Tensors = {}
  for name, tensor in tensors.items():
    # Rename first, since the rules for projections below use the new names.
    name = _renamed(name, 0, 1)
    if name in _PROJECTIONS and len(tensor.shape) == 2:
      tensor = tensor.map(lambda x: x.T, tensor.shape[::-1])
    if (match := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name)) and tensor.shape:
      # Each of the three parts reads the fused tensor again, so that only one of them is in memory.
      size = tensor.shape[0] // 3
      for i, part in enumerate("qkv"):
        third = slice(i * size, (i + 1) * size)
        shape = (size, *tensor.shape[1:])
        converted[f"{match[1]}.{part}_proj.{match[2]}"] = tensor.map(lambda x, third=third: x[third], shape)
    else:
      converted[name] = tensor
  return converted


def restore(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Shaped[np.ndarray, "..."]]:
  """Invert `convert`: return open_clip's arrays from CLIPModel's."""
  restored = {}
  for name, array in arrays.items():
    if match := re.fullmatch(r"(.+)\.q_proj\.(weight|bias)", name):
      parts = [arrays[f"{match[1]}.{part}_proj.{match[2]}"] for part in "qkv"]
      restored[_renamed(f"{match[1]}.in_proj_{match[2]}", 1, 0)] = np.concatenate(parts)
    elif not re.search(r"\.[kv]_proj\.", name):
      restored[_renamed(name, 1, 0)] = np.ascontiguousarray(array.T) if name in _PROJECTIONS else array
  return restored


def _renamed(name: str, source: int, target: int) -> str:
  for row in _TOWERS:
    if name.startswith(row[source]):
      name = row[target] + name[len(row[source]) :]
      break
  # The layers of both towers have the same names, so that their rules are separate from those of the towers.
  for row in _LAYERS:
    name = name.replace(row[source], row[target])
  return name


# Fields of open_clip's config: (our field, its field).
_VISION = (("image_size", "image_size"), ("patch", "patch_size"), ("width", "width"), ("depth", "layers"))
_TEXT = (
  ("max_length", "context_length"),
  ("vocab_size", "vocab_size"),
  ("width", "width"),
  ("depth", "layers"),
  ("num_heads", "heads"),
)
# Fields that do not affect a trained network.
_NO_MATTER = {"tokenizer_mode", "tokenizer_kwargs", "patch_dropout", "output_tokens"}
_NO_MATTER |= {"pad_id", "eos_id", "init_logit_scale"}
# Fields that may occur with the supported values.
_FIXED: dict[str, tuple[Any, ...]] = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",)}
_FIXED |= {"proj_type": ("linear",), "block_type": ("default",)}


def check_config(config: Any, where: str) -> None:
  """Raise UserError for a `model_cfg` with unsupported towers or settings."""
  _refuse_others(config, {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}, f"{where}: model_cfg")
  for name, fields in (("vision_cfg", _VISION), ("text_cfg", _TEXT)):
    known = {theirs for _, theirs in fields} | {"head_width", "mlp_ratio"}
    _refuse_others(config.get(name, {}), known, f"{where}: {name}")


def read_config(config: Mapping[str, Any], shapes: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
  """Return the `model` section, with both towers, of a `model_cfg` that `check_config` has accepted.

  Missing fields are taken from `shapes`, the section that the tensors' shapes give. Raises UserError: a setting is no
  number.
  """
  model = {}
  for part, name, fields in (("vision_encoder", "vision_cfg", _VISION), ("text_encoder", "text_cfg", _TEXT)):
    tower, here = config.get(name, {}), f"{where}: {name}"
    section = shapes[part] | {ours: _number(tower, theirs, shapes[part][ours], here) for ours, theirs in fields}
    if "mlp_ratio" in tower:
      if not isinstance(ratio := tower["mlp_ratio"], int | float) or ratio <= 0:
        raise unsupported(here, "mlp_ratio", ratio, "it should be a number such as 4.0")
      section["mlp_width"] = int(section["width"] * ratio)
    # A config with a vision tower's width also determines its heads, which are 64 wide by default.
    if "head_width" in tower or (part == "vision_encoder" and "width" in tower):
      section["num_heads"] = section["width"] // _number(tower, "head_width", CLIP_HEAD_WIDTH, here)
    # open_clip's default is the exact GELU; OpenAI's weights are published with `quick_gelu`.
    section["activation"] = "quick_gelu" if config.get("quick_gelu") else "gelu"
    model[part] = section | {"projection": _number(config, "embed_dim", section["projection"], where)}
  return model


def write_config(model: Mapping[str, Any]) -> dict[str, Any]:
  """Return the content of open_clip_config.json for a `model` section."""
  text, vision = model["text_encoder"], model["vision_encoder"]
  return {
    "model_cfg": {
      "embed_dim": text["projection"],
      "quick_gelu": text["activation"] == "quick_gelu",
      "vision_cfg": _tower(vision, _VISION) | {"head_width": vision["width"] // vision["num_heads"]},
      "text_cfg": _tower(text, _TEXT),
    },
    "preprocess_cfg": {"mean": PIXEL_MEAN, "std": PIXEL_STD, "interpolation": "bicubic", "resize_mode": "shortest"},
  }


def _tower(section: Mapping[str, Any], fields: Collection[tuple[str, str]]) -> dict[str, Any]:
  width, hidden = section["width"], section["mlp_width"]
  # Add half a unit if the product would be rounded down, so that open_clip's int(width * ratio) gives `hidden`.
  ratio = hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
  return {theirs: section[ours] for ours, theirs in fields} | {"mlp_ratio": ratio}


def _number(section: Mapping[str, Any], field: str, default: int, where: str) -> int:
  value = section.get(field, default)
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise unsupported(where, field, value, f"it should be a number such as {default}; {SUPPORTED}")
  return value


def _refuse_others(section: Any, known: Collection[str], where: str) -> None:
  """Raise UserError for an unknown field that is set and changes the network."""
  if not isinstance(section, Mapping):
    raise UserError(f"{where} is {section!r}; it should be an object")
  for field, value in section.items():
    if field not in known and field not in _NO_MATTER and value and value not in _FIXED.get(field, ()):
      raise unsupported(where, field, value, f"it is not supported; {SUPPORTED}")
