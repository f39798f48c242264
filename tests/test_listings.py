"""Count the parameters of every config independently of the code that lists them.

The parts of Stable Diffusion have as many as modules of diffusers and transformers of the same sizes; the parts that
DiffDis adds have as many as a formula gives. Weight decay applies only to matrices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ml_collections import ConfigDict
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from diffdis_jax.config.section import read_section
from diffdis_jax.interop import sections
from diffdis_jax.training import optim
from tests.test_configs import CASES, get_config, listing

LINE = re.compile(r"(\S+) float32\[([\d,]*)\] (\w+) \(\S*\)")
# The default and these arguments together train every parameter that any config trains.
REPRESENTATIVE = ("", "autoencoder", "share_attention=False", "objectives=contrastive")
# The published numbers of Stable Diffusion v1 with CLIP ViT-L/14's text tower.
SD_V1 = {"unet": 859_520_964, "autoencoder": 83_653_863, "text_encoder": 123_060_480}


@dataclasses.dataclass(frozen=True)
class Listed:
  shape: tuple[int, ...]
  group: str


@functools.cache
def listed(name: str, arg: str) -> dict[str, Listed]:
  """Return the shape and the group of each parameter, by its path."""
  lines = {}
  for line in listing(name, arg):
    path, shape, group = LINE.fullmatch(line).groups()
    assert path not in lines
    lines[path] = Listed(tuple(map(int, filter(None, shape.split(",")))), group)
  return lines


def count(*modules: torch.nn.Module) -> int:
  return sum(parameter.numel() for module in modules for parameter in module.parameters())


def clip(model: ConfigDict) -> dict[str, int]:
  """Count the parameters of both towers with their projections, by transformers' CLIPModel."""
  text, vision = model.text_encoder.to_dict(), model.vision_encoder.to_dict()
  with torch.device("meta"):
    theirs = CLIPModel(CLIPConfig(**sections.write_clip(text, vision)))
  return {
    "text_encoder": count(theirs.text_model, theirs.text_projection) + query_tokens(model),
    "vision_encoder": count(theirs.vision_model, theirs.visual_projection),
    "logit_scale": theirs.logit_scale.numel(),
  }


def stable_diffusion(model: ConfigDict) -> dict[str, int]:
  """Count the parameters of each part, and of the UNet's up blocks, by the libraries' modules on the meta device."""
  autoencoder, text = model.autoencoder.to_dict(), model.text_encoder.to_dict()
  unet = sections.write_unet(
    model.unet.to_dict(), latent_channels=autoencoder["latent_channels"], context_width=text["width"], sample_size=32
  )
  vae = sections.write_vae(autoencoder, scaling_factor=1.0, sample_size=32)
  channels = 3 * autoencoder["patch"] ** 2  # the pixels of a patch
  vae |= {"in_channels": channels, "out_channels": channels}
  with torch.device("meta"):
    theirs = UNet2DConditionModel.from_config(unet)
    return {
      "unet": count(theirs),
      "up": count(theirs.up_blocks, theirs.conv_norm_out, theirs.conv_out),
      "autoencoder": count(AutoencoderKL.from_config(vae)),
      "text_encoder": count(CLIPTextModel(CLIPTextConfig(**sections.write_text(text)))),
    }


def linear(din: int, dout: int, *, bias: bool = True) -> int:
  return din * dout + bias * dout


def query_tokens(model: ConfigDict) -> int:
  """Count the second embedding of each token, if the text query has one."""
  text = model.text_encoder
  return text.vocab_size * text.width if text.token_embedding_weight else 0


def text_stream(model: ConfigDict) -> int:
  """Count the embedder of t_e, and the text stream's parameters in each fused block (the paper's Figure 3)."""
  d, unet = model.text_encoder.width, model.unet
  total = linear(d, d) + linear(d, d)
  fused = [w for w, attends in zip(unet.widths, unet.attention) if attends for _ in range(unet.depth)]
  for c in [*fused, unet.widths[-1]] if model.fusion else ():
    total += linear(d, c) + linear(c, d)
    if model.modality_ffn:
      total += 2 * c + linear(c, 8 * c) + linear(4 * c, c)
    if not model.share_attention:
      total += 3 * linear(c, c, bias=False) + linear(c, c)
  return total


def alignment(model: ConfigDict) -> int:
  """Count the input, transformer layers with an MLP of ratio 4, last norm, predictor, and pooling of the map."""
  d, w = model.text_encoder.width, model.alignment.width
  layer = 4 * linear(w, w) + linear(w, 4 * w) + linear(4 * w, w) + 2 * 2 * w
  c, parts = model.unet.widths[-1], model.alignment.spatial_pool
  of_map = 2 * c + linear(parts**2 * c, d) if parts else 0
  ends = linear(d, w) + linear(model.unet.widths[-1], w) + 2 * w + linear(w, d)
  return ends + model.alignment.depth * layer + of_map


def head(model: ConfigDict) -> dict[str, int]:
  """Count the head of long-tailed recognition: V's two layers, two LayerNorms, two matrices, and the anchors."""
  if not model.get("head"):
    return {}
  d, k = model.text_encoder.projection or model.text_encoder.width, model.head.classes
  return {"head": linear(d, 4 * d) + linear(4 * d, k) + 2 * 2 * d + 2 * d * d + k * model.head.anchors * d}


def expected_parts(config: ConfigDict) -> dict[str, int]:
  model, objectives = config.model, config.objectives
  if "vision_encoder" in model:
    return {**clip(model), **head(model)}
  theirs = stable_diffusion(model)
  up = theirs.pop("up")
  theirs["autoencoder"] += 2 * model.autoencoder.latent_channels  # shift and scale
  if "reconstruction" in objectives:
    return {"autoencoder": theirs["autoencoder"]}
  if not {"discrimination", "class_contrastive", "long_tail_head"} & {*objectives}:
    return theirs
  theirs["text_encoder"] += query_tokens(model)
  if "generation" not in objectives:
    theirs["unet"] -= up
  return {**theirs, "text_stream": text_stream(model), "alignment": alignment(model), "logit_scale": 1, **head(model)}


@pytest.mark.slow
@pytest.mark.parametrize("name, arg", CASES)
def test_listings_have_as_many_parameters_as_the_libraries_modules(name, arg):
  counts: dict[str, int] = {}
  for path, parameter in listed(name, arg).items():
    part = path.split(".")[0]
    counts[part] = counts.get(part, 0) + math.prod(parameter.shape)
  assert counts == expected_parts(get_config(name, arg))


def test_the_papers_network_has_the_published_numbers_of_parameters():
  assert SD_V1.items() <= stable_diffusion(get_config("diffdis_cc3m").model).items()


def decayed(name: str, arg: str) -> set[str]:
  """Return the paths of the parameters that the config's optimizer shrinks in a step with zero gradients."""
  section = read_section(optim.Optim, get_config(name, arg).optim.to_dict(), "optim")
  section = dataclasses.replace(section, warmup_steps=0)
  trained = (path for path, parameter in listed(name, arg).items() if parameter.group != "frozen")
  params = {path: np.ones((), np.float32) for path in trained}
  optimizer = optim.build_optimizer(params, section, num_steps=2)
  with jax.numpy_dtype_promotion("standard"):
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params, step=np.int32(0))
  return {path for path, update in updates.items() if update < 0}


def matrices(name: str, arg: str) -> set[str]:
  """Return the trained matrices, convolutions and embeddings. Position embeddings count as biases."""
  axes = {path: len(line.shape) for path, line in listed(name, arg).items() if line.group != "frozen"}
  if name.endswith("_lt"):  # in VL-LTR all but vectors decay, also positions and logit_scale
    return {path for path, count in axes.items() if count != 1}
  return {path for path, count in axes.items() if count > 1 and not path.endswith(".positions")}


@pytest.mark.parametrize(
  "name, arg",
  [
    pytest.param(name, arg, marks=() if name in ("shapes", "places_lt", "clip_cc3m") else pytest.mark.slow)
    for name, arg in CASES
    if name != "benchmark" and arg in REPRESENTATIVE
  ],
)
def test_weight_decay_applies_only_to_matrices(name, arg):
  assert decayed(name, arg) == matrices(name, arg) != set()
