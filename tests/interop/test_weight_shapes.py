"""Compare the sizes that are read from a checkpoint's tensors with open_clip's configs of published checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.interop import openclip, sections
from diffdis_jax.interop.tensor_files import Tensor, Tensors

CONFIGS = {name: config for name in open_clip.list_models() if (config := open_clip.get_model_config(name))}


def is_supported(config: dict[str, Any]) -> bool:
  try:
    openclip.check_config(config, "here")
  except UserError:
    return False
  return isinstance(config["vision_cfg"]["layers"], int)  # a ResNet has four numbers


def as_tensors(**shapes_by_name: tuple[int, ...]) -> Tensors:
  return {name: Tensor(shape, lambda: np.empty(0)) for name, shape in shapes_by_name.items()}


def towers(config: dict[str, Any]) -> dict[str, Any]:
  """Return the `model` section that sections.py reads from the tensors of a config's checkpoint."""
  image, text = config["vision_cfg"], config["text_cfg"]
  width, patch = image["width"], image["patch_size"]
  positions = (image["image_size"] // patch) ** 2 + 1
  tensors = as_tensors(
    **{
      "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
      "vision_model.embeddings.position_embedding.weight": (positions, width),
      "vision_model.encoder.layers.0.mlp.fc1.weight": (int(width * image.get("mlp_ratio", 4)), width),
      "visual_projection.weight": (config["embed_dim"], width),
      "text_model.embeddings.token_embedding.weight": (text["vocab_size"], text["width"]),
      "text_model.embeddings.position_embedding.weight": (text["context_length"], text["width"]),
      "text_model.encoder.layers.0.mlp.fc1.weight": (4 * text["width"], text["width"]),
    }
  )
  return {"vision_encoder": sections.vision_of(tensors), "text_encoder": sections.text_of(tensors)}


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if is_supported(config)])
def test_heads_and_sizes_of_published_towers_are_known_without_a_config(name):
  """The shapes of tensors do not give the number of heads, and ViT-H's heads are not 64 wide."""
  config = CONFIGS[name]
  sizes = towers(config)
  sizes["text_encoder"]["projection"] = config["embed_dim"]
  bare, configured = (openclip.read_config(given, sizes, "here") for given in ({}, config))
  for tower in ("vision_encoder", "text_encoder"):
    fields = ("num_heads", "width", "mlp_width", "projection")
    assert {field: bare[tower][field] for field in fields} == {field: configured[tower][field] for field in fields}
  width, of_64 = config["vision_cfg"]["width"], "head_width" not in config["vision_cfg"]
  assert configured["vision_encoder"]["num_heads"] == width // (64 if of_64 else config["vision_cfg"]["head_width"])


def test_a_config_without_a_head_width_has_heads_of_64():
  sizes = towers(CONFIGS["ViT-H-14"])
  sizes["text_encoder"]["projection"] = 1024
  configured = openclip.read_config({"vision_cfg": {"width": 1280}}, sizes, "here")
  assert configured["vision_encoder"]["num_heads"] == 20  # open_clip builds it with this number
