"""Compute the paper's discrimination pass in float64 PyTorch, written from the paper around diffusers' UNet.

The network's own parameters come as {our path: array}; kernels are [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding

Tensor = torch.Tensor


class Weights:
  """The parameters below `prefix` in float64, and the few functions of them that are needed."""

  def __init__(self, params: Mapping[str, np.ndarray], prefix: str):
    below = {path.removeprefix(prefix): value for path, value in params.items() if path.startswith(prefix)}
    self.values = {path: torch.from_numpy(np.asarray(value, np.float64)) for path, value in below.items()}

  def linear(self, name: str, x: Tensor) -> Tensor:
    return F.linear(x, self.values[f"{name}.kernel"].T, self.values.get(f"{name}.bias"))

  def layer_norm(self, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.values[f"{name}.norm.scale"], self.values[f"{name}.norm.bias"])

  def embed_time(self, t: Tensor) -> Tensor:
    width = self.values["embedder.fc1.kernel"].shape[0]
    sinusoid = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0).double()
    return self.linear("embedder.fc2", F.silu(self.linear("embedder.fc1", sinusoid)))


def fused_block(
  image_block: torch.nn.Module,
  text: Weights,
  *,
  x: Tensor,
  c: Tensor,
  u: Tensor,
  num_heads: int,
  share_attention: bool,
  modality_ffn: bool,
) -> tuple[Tensor, Tensor]:
  """Return image features [b c h w] and h_e after one block. `u` is h_e + e_t + Embedder(t_e)."""
  block = image_block.transformer_blocks[0]
  image = image_block.proj_in(image_block.norm(x)).flatten(2).transpose(1, 2)
  tokens = torch.cat([text.linear("fc_in", u)[:, None], image], dim=1)

  normed = block.norm1(tokens)
  if share_attention:
    attended = block.attn1(normed)
  else:
    mixed = []
    for name, image_weights in (("q", block.attn1.to_q), ("k", block.attn1.to_k), ("v", block.attn1.to_v)):
      joined = torch.cat([text.linear(f"attn.{name}", normed[:, :1]), image_weights(normed[:, 1:])], dim=1)
      mixed.append(joined.unflatten(-1, (num_heads, -1)).transpose(1, 2))
    heads = F.scaled_dot_product_attention(*mixed).transpose(1, 2).flatten(2)
    attended = torch.cat([text.linear("attn.out", heads[:, :1]), block.attn1.to_out[0](heads[:, 1:])], dim=1)
  tokens = tokens + attended

  token, image = tokens[:, 0], tokens[:, 1:]
  image = image + block.attn2(block.norm2(image), c)
  image = image + block.ff(block.norm3(image))
  if modality_ffn:
    value, gate = text.linear("ff.proj", text.layer_norm("norm", token)).chunk(2, dim=-1)
    token = token + text.linear("ff.out", value * F.gelu(gate))
  else:
    token = token + block.ff(block.norm3(token))
  return x + image_block.proj_out(image.transpose(1, 2).reshape(x.shape)), text.linear("fc_out", token)


def alignment(
  weights: Weights, *, h_e: Tensor, features: Tensor, depth: int, num_heads: int, spatial_pool: int = 0
) -> Tensor:
  """Return ê_0 from the hidden text query and the middle feature map [b c h w]."""
  of_map = 0.0
  if spatial_pool:
    normed = weights.layer_norm("map_norm", features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    means = F.adaptive_avg_pool2d(normed, spatial_pool)
    of_map = weights.linear("map_out", means.permute(0, 2, 3, 1).flatten(1))
  image = weights.linear("image_in", features.flatten(2).transpose(1, 2))
  tokens = torch.cat([weights.linear("text_in", h_e)[:, None], image], dim=1)
  width = tokens.shape[-1]
  for i in range(depth):
    layer = torch.nn.TransformerEncoderLayer(
      width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    get = lambda name, i=i: weights.values[f"layers.{i}.{name}"]
    layer.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([get(f"attn.{name}.kernel").T for name in "qkv"]),
        "self_attn.in_proj_bias": torch.cat([get(f"attn.{name}.bias") for name in "qkv"]),
        "self_attn.out_proj.weight": get("attn.out.kernel").T,
        "self_attn.out_proj.bias": get("attn.out.bias"),
        "linear1.weight": get("mlp.fc1.kernel").T,
        "linear1.bias": get("mlp.fc1.bias"),
        "linear2.weight": get("mlp.fc2.kernel").T,
        "linear2.bias": get("mlp.fc2.bias"),
        "norm1.weight": get("norm1.norm.scale"),
        "norm1.bias": get("norm1.norm.bias"),
        "norm2.weight": get("norm2.norm.scale"),
        "norm2.bias": get("norm2.norm.bias"),
    })  # fmt: skip
    tokens = layer(tokens)
  return weights.linear("predictor", weights.layer_norm("norm", tokens[:, 0])) + of_map


def discrimination(
  unet: UNet2DConditionModel,
  params: Mapping[str, np.ndarray],
  *,
  e_t: Tensor,
  t_e: Tensor,
  z: Tensor,
  t_z: Tensor,
  c_null: Tensor,
  num_heads: int,
  fusion: bool,
  share_attention: bool,
  modality_ffn: bool,
  alignment_depth: int,
  alignment_heads: int,
) -> Tensor:
  """Run the down path and the middle, with the text token from the first attention block on, then the alignment."""
  time = Weights(params, "text_stream.").embed_time(t_e)
  temb = unet.time_embedding(unet.time_proj(t_z).double())
  h, h_e, index = unet.conv_in(z), torch.zeros_like(e_t), 0

  def attend(block: torch.nn.Module, h: Tensor, h_e: Tensor) -> tuple[Tensor, Tensor]:
    if not fusion:
      return block(h, encoder_hidden_states=c_null, return_dict=False)[0], h_e
    return fused_block(
      block,
      Weights(params, f"text_stream.blocks.{index}."),
      x=h,
      c=c_null,
      u=h_e + e_t + time,
      num_heads=num_heads,
      share_attention=share_attention,
      modality_ffn=modality_ffn,
    )

  for level in unet.down_blocks:
    for i, resnet in enumerate(level.resnets):
      h = resnet(h, temb)
      if hasattr(level, "attentions"):
        h, h_e = attend(level.attentions[i], h, h_e)
        index += 1
    for downsampler in level.downsamplers or ():
      h = downsampler(h)
  h = unet.mid_block.resnets[0](h, temb)
  h, h_e = attend(unet.mid_block.attentions[0], h, h_e)
  h = unet.mid_block.resnets[1](h, temb)
  weights = Weights(params, "alignment.")
  h_e = h_e if fusion else e_t + time
  return alignment(weights, h_e=h_e, features=h, depth=alignment_depth, num_heads=alignment_heads)
