"""Compare the names of single-file checkpoints with diffusers' converter, at full size on the meta device."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.loaders import single_file_utils

from diffdis_jax.interop import compvis
from diffdis_jax.interop.tensor_files import Tensor
from tests import compvis_names
from tests.interop.test_mapping import full_size


@pytest.fixture(scope="module")
def single_file() -> dict[str, torch.Tensor]:
  """Return Stable Diffusion v1's checkpoint file as meta tensors."""
  states = {component: full_size(component).state_dict() for component in ("unet", "vae", "text_encoder")}
  states["text_encoder"] = {f"text_model.{name}": tensor for name, tensor in states["text_encoder"].items()}
  return compvis_names.single_file(states, depth=2, levels=4)


def test_the_names_of_published_checkpoints_occur(single_file):
  """The published file contains these names, whose numbers are easy to get wrong."""
  for name in (
    "model.diffusion_model.input_blocks.3.0.op.weight",
    "model.diffusion_model.output_blocks.2.1.conv.weight",
    "model.diffusion_model.output_blocks.5.2.conv.weight",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_v.weight",
    "first_stage_model.encoder.down.0.downsample.conv.weight",
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias",
  ):
    assert name in single_file
  assert len(single_file) == 686 + 248 + 196


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_names_equal_those_of_diffusers_converter(single_file, component):
  tensors = {name: Tensor(tuple(tensor.shape), lambda: None) for name, tensor in single_file.items()}
  extras = {"model_ema.decay": Tensor((), lambda: None), "betas": Tensor((1000,), lambda: None)}
  components, renamed = compvis.split(tensors | extras)
  if component == "unet":
    expected = single_file_utils.convert_ldm_unet_checkpoint(dict(single_file), {"layers_per_block": 2})
  elif component == "vae":
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    expected = single_file_utils.convert_ldm_vae_checkpoint(dict(single_file), kinds)
  else:
    expected = single_file_utils.convert_ldm_clip_checkpoint(dict(single_file))
  squeezed = lambda shape: tuple(n for n in shape if n != 1)
  assert {name: squeezed(tensor.shape) for name, tensor in components[component].items()} == {
    name: squeezed(tensor.shape) for name, tensor in expected.items()
  }
  assert renamed == list(extras)


def test_the_depth_of_a_unet_is_read_from_its_names():
  blocks = lambda *names: [f"{name}.weight" for name in names]
  one_level = blocks("input_blocks.0.0", "input_blocks.1.0.in_layers.0", "input_blocks.2.0.in_layers.0")
  assert compvis.unet_depth(one_level) == 2
  assert compvis.unet_depth(one_level + blocks("input_blocks.3.0.op", "input_blocks.4.0.x", "input_blocks.5.0.x")) == 2
  assert compvis.unet_depth([]) == 1


@pytest.mark.parametrize("name", ["input_blocks.1.7.x", "output_blocks.x.0.y", "label_emb.weight", "anything"])
def test_unknown_names_are_accepted(name):
  assert re.fullmatch(r"[\w.]+", compvis.unet_name(name, depth=2))
