"""The table of parameter names, ours and theirs, and of the permutation of axes. Import and export both use it.

Their names are those of PyTorch's state dicts, by component:

  unet, vae     diffusers' UNet2DConditionModel and AutoencoderKL
  text_encoder  transformers' CLIPTextModel, with the prefix `text_model.` of published checkpoints
  diffdis       the PyTorch model of torch_diffdis.py
  clip          transformers' CLIPModel, both towers
  head          the language-guided head of long-tailed recognition, which other libraries lack

A row is (our path, their name, axes), in which `#` stands for an index. `under` adds a prefix to a sub-table, such as
that of a single layer (LINEAR, CONV, NORM, EMBEDDING).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

Axes = tuple[int, ...]
DIFFDIS = ("unet", "vae", "text_encoder", "diffdis", "head")
CLIP = ("clip", "head")

# The statistics of latents. diffusers has only a number for them, `scaling_factor` in the autoencoder's config.
STATISTICS = ("autoencoder.shift", "autoencoder.scale")


class Row(NamedTuple):
  """The names of a parameter, or of a pattern of parameters."""

  ours: str  # dotted path
  theirs: str  # name in the state dict
  axes: Axes = ()  # theirs = ours.transpose(axes); empty if both have the same layout


Rows = tuple[Row, ...]


class Entry(NamedTuple):
  """A row with its indices filled in, and the component to which it belongs."""

  component: str
  path: str
  name: str
  axes: Axes

  def to_theirs(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    return ours.transpose(self.axes) if self.axes else ours

  def to_ours(self, theirs: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    # The argsort of a permutation is its inverse.
    return theirs.transpose(np.argsort(self.axes)) if self.axes else theirs

  def shape_in_theirs(self, ours: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that our array of this shape has in their layout."""
    return tuple(ours[i] for i in self.axes) if self.axes else tuple(ours)


def from_path(path: str, components: Sequence[str] = DIFFDIS) -> Entry:
  """Return the entry of our path. Raises KeyError: the table has no such path, as for STATISTICS.

  `components` is DIFFDIS, or CLIP for the CLIP baseline, some of whose parameters have the same paths.
  """
  for component in components:
    for row in TABLE[component]:
      if indices := _regex(row.ours).fullmatch(path):
        return Entry(component, path, _fill(row.theirs, indices), row.axes)
  raise KeyError(f"interop/mapping.py has no row for parameter {path}")


def from_name(component: str, name: str) -> Entry | None:
  """Return the entry of their name, or None for a tensor that is not used here."""
  for row in TABLE[component]:
    if indices := _regex(row.theirs).fullmatch(name):
      return Entry(component, _fill(row.ours, indices), name, row.axes)
  return None


def under(ours: str, theirs: str, rows: Sequence[Row]) -> Rows:
  """Add a prefix to the names of rows on each side; an empty prefix changes nothing."""
  below = lambda prefix, name: f"{prefix}.{name}" if prefix else name
  return tuple(Row(below(ours, row.ours), below(theirs, row.theirs), row.axes) for row in rows)


def _same(rows: Rows, *names: str) -> Rows:
  """Add each of these prefixes, the same on both sides, to a sub-table."""
  return tuple(row for name in names for row in under(name, name, rows))


def _pairs(rows: Rows, **names: str) -> Rows:
  """Add each of these pairs of prefixes, ours=theirs, to a sub-table."""
  return tuple(row for ours, theirs in names.items() for row in under(ours, theirs, rows))


# A name is compared with the rows one by one, so the compiled patterns are cached.
@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
  return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))


def _fill(pattern: str, indices: re.Match[str]) -> str:
  return "".join(part + index for part, index in zip(pattern.split("#"), (*indices.groups(), ""), strict=True))


# Single layers. Only kernels have another layout, since Flax computes x @ w and PyTorch x @ w.T: [in, out] and
# [h, w, in, out] here, [out, in] and [out, in, h, w] there.
LINEAR = (Row("kernel", "weight", (1, 0)), Row("bias", "bias"))
CONV = (Row("kernel", "weight", (3, 2, 0, 1)), Row("bias", "bias"))
NORM = (Row("norm.scale", "weight"), Row("norm.bias", "bias"))
EMBEDDING = (Row("embedding", "weight"),)

# Stable Diffusion.
RESNET = (
  *_same(NORM, "norm1", "norm2"),
  *_same(CONV, "conv1", "conv2"),
  *_pairs(LINEAR, time="time_emb_proj"),
  *_pairs(CONV, shortcut="conv_shortcut"),
)
ATTENTION = _pairs(LINEAR, q="to_q", k="to_k", v="to_v", out="to_out.0")
SPATIAL_TRANSFORMER = (
  *_same(NORM, "norm"),
  *_same(CONV, "proj_in", "proj_out"),
  *under(
    "block",
    "transformer_blocks.0",
    (
      *_same(NORM, "norm1", "norm2", "norm3"),
      *_same(ATTENTION, "attn1", "attn2"),
      *under("ff.proj", "ff.net.0.proj", LINEAR),
      *under("ff.out", "ff.net.2", LINEAR),
    ),
  ),
)
# The sub-table is for both ways: a down block has no upsampling, but a row without a parameter does no harm.
UNET_LEVEL = (*_same(RESNET, "resnets.#"), *_same(SPATIAL_TRANSFORMER, "attentions.#"))
UNET = (
  *_same(CONV, "conv_in", "conv_out"),
  *under("time.fc1", "time_embedding.linear_1", LINEAR),
  *under("time.fc2", "time_embedding.linear_2", LINEAR),
  *under("down.#", "down_blocks.#", (*UNET_LEVEL, *under("downsample.conv", "downsamplers.0.conv", CONV))),
  *under("middle.resnet1", "mid_block.resnets.0", RESNET),
  *under("middle.attention", "mid_block.attentions.0", SPATIAL_TRANSFORMER),
  *under("middle.resnet2", "mid_block.resnets.1", RESNET),
  *under("up.#", "up_blocks.#", (*UNET_LEVEL, *under("upsample.conv", "upsamplers.0.conv", CONV))),
  *under("norm_out", "conv_norm_out", NORM),
)
VAE_MIDDLE = (
  *_pairs(RESNET, resnet1="resnets.0", resnet2="resnets.1"),
  *under("attention.norm", "attentions.0.group_norm", NORM),
  *under("attention.attn", "attentions.0", ATTENTION),
)
# Encoder and decoder are one module here and two there, whose autoencoder also has the layers between them.
VAE = (
  *_pairs(CONV, conv_in="encoder.conv_in", encoder_out="encoder.conv_out", decoder_in="decoder.conv_in"),
  *_pairs(CONV, quant="quant_conv", post_quant="post_quant_conv", conv_out="decoder.conv_out"),
  *_pairs(NORM, encoder_norm="encoder.conv_norm_out", decoder_norm="decoder.conv_norm_out"),
  *_pairs(VAE_MIDDLE, encoder_middle="encoder.mid_block", decoder_middle="decoder.mid_block"),
  *under("down.#.resnets.#", "encoder.down_blocks.#.resnets.#", RESNET),
  *under("down.#.resample.conv", "encoder.down_blocks.#.downsamplers.0.conv", CONV),
  *under("up.#.resnets.#", "decoder.up_blocks.#.resnets.#", RESNET),
  *under("up.#.resample.conv", "decoder.up_blocks.#.upsamplers.0.conv", CONV),
)

# CLIP.
CLIP_LAYERS = under(
  "layers.#",
  "encoder.layers.#",
  (
    *_pairs(NORM, norm1="layer_norm1", norm2="layer_norm2"),
    *under("attn", "self_attn", _pairs(LINEAR, q="q_proj", k="k_proj", v="v_proj", out="out_proj")),
    *_same(LINEAR, "mlp.fc1", "mlp.fc2"),
  ),
)
TEXT_TOWER = (
  *under("tokens", "embeddings.token_embedding", EMBEDDING),
  Row("positions", "embeddings.position_embedding.weight"),
  *CLIP_LAYERS,
  *under("norm", "final_layer_norm", NORM),
)
VISION_TOWER = (
  *under("patch", "embeddings.patch_embedding", CONV),
  # CLIPModel's name has no `.weight`, since this is no nn.Embedding, unlike its positions.
  Row("class_token", "embeddings.class_embedding"),
  Row("positions", "embeddings.position_embedding.weight"),
  *under("pre_norm", "pre_layrnorm", NORM),  # transformers' spelling
  *CLIP_LAYERS,
  *under("norm", "post_layernorm", NORM),
)

# The parts that DiffDis adds. Most names equal those of the PyTorch model in torch_diffdis.py.
OWN_ATTENTION = _same(LINEAR, "q", "k", "v", "out")
FUSION_BLOCK = (
  *_same(LINEAR, "fc_in", "fc_out", "ff.proj", "ff.out"),
  *(*_same(OWN_ATTENTION, "attn"), *_same(NORM, "norm")),
)
OWN_LAYER = (*_same(NORM, "norm1", "norm2"), *_same(OWN_ATTENTION, "attn"), *_same(LINEAR, "mlp.fc1", "mlp.fc2"))
ALIGNMENT = (
  *_same(LINEAR, "text_in", "image_in", "predictor", "map_out"),
  *_same(OWN_LAYER, "layers.#"),
  *_same(NORM, "norm", "map_norm"),
)

TABLE: dict[str, Rows] = {
  "unet": under("unet", "", UNET),
  "vae": under("autoencoder", "", VAE),
  "text_encoder": under("text_encoder", "text_model", TEXT_TOWER),
  "diffdis": (
    *_same(LINEAR, "text_stream.embedder.fc1", "text_stream.embedder.fc2"),
    *_same(FUSION_BLOCK, "text_stream.blocks.#"),
    *_same(ALIGNMENT, "alignment"),
    *under("text_encoder.projection", "text_projection", LINEAR),
    *under("text_encoder.query_tokens", "query_tokens", EMBEDDING),
    Row("logit_scale", "logit_scale"),
  ),
  "clip": (
    *under("text_encoder", "text_model", TEXT_TOWER),
    *under("text_encoder.projection", "text_projection", LINEAR),
    *under("vision_encoder", "vision_model", VISION_TOWER),
    *under("vision_encoder.projection", "visual_projection", LINEAR),
    Row("logit_scale", "logit_scale"),
  ),
  "head": under(
    "head",
    "",
    (*_same(LINEAR, "fc1", "fc2", "q", "k"), *_same(NORM, "query_norm", "key_norm"), Row("anchors", "anchors")),
  ),
}
"""The rows of each component."""
