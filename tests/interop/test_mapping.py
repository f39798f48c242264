"""Test that the table of names is one to one and complete on both sides, and that values are converted exactly."""

from __future__ import annotations

import functools
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from diffdis_jax.interop import mapping

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
VISION_L14 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
TEXT_L14 = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


@functools.cache
def golden(name: str) -> dict[str, tuple[int, ...]]:
  """Return the shapes of our parameters from a config's golden listing."""
  lines = [line.removeprefix("+ ").split() for line in (GOLDEN / f"{name}.txt").read_text().splitlines()]
  shapes = {path: re.search(r"\[(.*)\]", kind)[1] for path, kind, *_ in lines if path != "-"}
  return {
    path: tuple(int(n) for n in shape.split(",") if n)
    for path, shape in shapes.items()
    if path not in mapping.STATISTICS
  }


def full_size(component: str) -> torch.nn.Module:
  """Return a component of Stable Diffusion v1 without allocating it."""
  with torch.device("meta"):
    if component == "unet":
      return UNet2DConditionModel(cross_attention_dim=768)
    if component == "vae":
      kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
      return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **kinds)
    return CLIPTextModel(CLIPTextConfig(**TEXT_L14))


def shapes_of(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
  return {prefix + name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_every_parameter_of_every_config_has_one_name(name):
  is_clip = any(path.startswith("vision_encoder.") for path in golden(name))
  components = mapping.CLIP if is_clip else mapping.DIFFDIS
  entries = [mapping.from_path(path, components) for path in golden(name)]
  assert len({(entry.component, entry.name) for entry in entries}) == len(entries)
  for entry in entries:
    assert mapping.from_name(entry.component, entry.name) == entry


@pytest.mark.parametrize("component, prefix", [("unet", ""), ("vae", ""), ("text_encoder", "text_model.")])
def test_stable_diffusion_at_full_size_is_covered_on_both_sides(component, prefix):
  theirs = shapes_of(full_size(component), prefix)
  entries = {
    entry.name: entry for path in golden("diffdis_cc3m") if (entry := mapping.from_path(path)).component == component
  }
  ours = {name: entry.shape_in_theirs(golden("diffdis_cc3m")[entry.path]) for name, entry in entries.items()}
  assert ours == theirs
  for name, shape in theirs.items():
    entry = mapping.from_name(component, name)
    assert entry.to_ours(np.broadcast_to(0.0, shape)).shape == golden("diffdis_cc3m")[entry.path]


VIT_L14 = CLIPConfig(text_config=TEXT_L14, vision_config=VISION_L14, projection_dim=768)


@pytest.mark.parametrize("config", [CLIPConfig(), VIT_L14], ids=["ViT-B/32", "ViT-L/14"])
def test_every_parameter_of_clip_has_one_path(config):
  with torch.device("meta"):
    theirs = shapes_of(CLIPModel(config))
  entries = [mapping.from_name("clip", name) for name in theirs]
  assert None not in entries
  assert len({entry.path for entry in entries}) == len(entries) == (398 if config.projection_dim == 512 else 590)
  assert [mapping.from_path(entry.path, mapping.CLIP) for entry in entries] == entries


def test_each_name_matches_only_one_row():
  for rows in mapping.TABLE.values():
    for side in ("ours", "theirs"):
      names = [row._asdict()[side].replace("#", "0") for row in rows]
      assert len(set(names)) == len(rows)
      for name in names:
        assert sum(mapping._regex(row._asdict()[side]).fullmatch(name) is not None for row in rows) == 1, name


@pytest.mark.parametrize("path", [*mapping.STATISTICS, "unet.conv_in.weight", "unet.down.x.resnets.0.conv1.kernel"])
def test_unknown_paths_are_errors_and_unknown_names_are_none(path):
  with pytest.raises(KeyError, match=re.escape(path)):
    mapping.from_path(path)
  assert mapping.from_name("text_encoder", "text_model.embeddings.position_ids") is None
  assert mapping.from_name("vae", "xconv_in.weight") is None


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
  "path, shape",
  [("unet.conv_in.kernel", (3, 3, 4, 8)), ("unet.time.fc1.kernel", (4, 6)), ("unet.time.fc1.bias", (6,))]
  + [("text_encoder.tokens.embedding", (5, 3)), ("logit_scale", ())],
)
def test_values_are_converted_to_torch_and_back_bit_for_bit(path, shape, dtype):
  entry = mapping.from_path(path)
  ours = np.random.default_rng(0).standard_normal(shape).astype(dtype)
  theirs = entry.to_theirs(ours)
  assert theirs.shape == entry.shape_in_theirs(shape)
  assert entry.to_ours(theirs).tobytes() == ours.tobytes()


def test_kernels_have_the_layout_of_torch():
  rng = np.random.default_rng(0)
  x, linear = rng.standard_normal((2, 4)), rng.standard_normal((4, 6))
  theirs = mapping.from_path("unet.time.fc1.kernel").to_theirs(linear)
  to_torch = lambda array: torch.from_numpy(np.ascontiguousarray(array))
  np.testing.assert_allclose(torch.nn.functional.linear(to_torch(x), to_torch(theirs)), x @ linear, rtol=1e-12)
  kernel, image = rng.standard_normal((3, 3, 4, 5)), rng.standard_normal((1, 3, 3, 4))
  theirs = mapping.from_path("unet.conv_in.kernel").to_theirs(kernel)
  output = torch.nn.functional.conv2d(to_torch(np.moveaxis(image, -1, 1)), to_torch(theirs))
  np.testing.assert_allclose(output[0, :, 0, 0], np.einsum("hwi,hwio->o", image[0], kernel), rtol=1e-12)
