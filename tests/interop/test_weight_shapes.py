"""What a checkpoint without a config says, against the configs that open_clip has for published ones."""

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


def unread(**shapes_by_name: tuple[int, ...]) -> Tensors:
  return {name: Tensor(shape, lambda: np.empty(0)) for name, shape in shapes_by_name.items()}


def towers(config: dict[str, Any]) -> dict[str, Any]:
  """The `model` section that its checkpoint's tensors have, of which sections.py reads these."""
  image, text = config["vision_cfg"], config["text_cfg"]
  width, patch = image["width"], image["patch_size"]
  positions = (image["image_size"] // patch) ** 2 + 1
  tensors = unread(
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
def test_a_published_towers_heads_and_sizes_are_known_without_its_config(name):
  """Of its tensors' shapes none says how many heads there are: ViT-H's are not of 64."""
  config = CONFIGS[name]
  found = towers(config)
  found["text_encoder"]["projection"] = config["embed_dim"]
  bare, said = (openclip.read_config(each, found, "here") for each in ({}, config))
  for tower in ("vision_encoder", "text_encoder"):
    same = ("num_heads", "width", "mlp_width", "projection")
    assert {field: bare[tower][field] for field in same} == {field: said[tower][field] for field in same}
  width, of_64 = config["vision_cfg"]["width"], "head_width" not in config["vision_cfg"]
  assert said["vision_encoder"]["num_heads"] == width // (64 if of_64 else config["vision_cfg"]["head_width"])


def test_a_config_that_says_a_width_alone_has_heads_of_64():
  found = towers(CONFIGS["ViT-H-14"])
  found["text_encoder"]["projection"] = 1024
  said = openclip.read_config({"vision_cfg": {"width": 1280}}, found, "here")
  assert said["vision_encoder"]["num_heads"] == 20  # as open_clip builds it
