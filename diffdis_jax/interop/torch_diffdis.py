"""DiffDis for PyTorch: the discriminative half of the method in one file, around diffusers' own UNet2DConditionModel.

It needs torch, diffusers, transformers and jaxtyping, and nothing of JAX or of the rest of this package, so that it can
be copied into another project. The generative half is diffusers' StableDiffusionPipeline, on the same folder.

  model = DiffDis.from_pretrained(FOLDER)
  z = model.encode_image(pixels)
  image = model.embed_image(z, steps=1, noise=torch.randn(len(z), model.query_width))
  scores = model.similarity(image, model.embed_text(input_ids))

FOLDER is what export_weights writes: a StableDiffusionPipeline with two files beside its own,
  diffdis.safetensors    text_stream, alignment, logit_scale, text_projection where the query goes through CLIP's, and
                         query_tokens where token vectors are added to it
  diffdis_config.json    of the run's config: model.{fusion, share_attention, modality_ffn, alignment}, text_diffusion,
                         model.text_encoder.{width, vocab_size, projection, token_embedding_weight, bos_id, eos_id},
                         condition_timestep, max_length, inference.normalize_query; token_embedding_weight is 0 and
                         normalize_query true where they are absent
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

Query = Float[Tensor, "b e"]
Tokens = Float[Tensor, "b n d"]
Features = Float[Tensor, "b c h w"]
Timesteps = Int[Tensor, "b"]
Part = Any  # a module of diffusers or transformers; by nn.Module's annotations, each attribute of it may be a Tensor

NUM_TIMESTEPS = 1000


class Streams(NamedTuple):
  """The two streams after a block: image features, and the text token's hidden state h_e."""

  image: Features
  h_e: Query


class Rates(NamedTuple):
  """√ᾱ(t) and √(1 − ᾱ(t)), f32."""

  signal: Float[Tensor, "b 1"]
  sigma: Float[Tensor, "b 1"]


def alpha_bar(schedule: str) -> Float[Tensor, " n"]:
  """ᾱ(t) of a noise schedule, float64. Its last entry, at t = -1, is the data's: 1."""
  # float64, as method/schedules.py has it, so that a sampler's coefficients are exact; on the CPU, as not every device
  # knows float64.
  linspace = functools.partial(torch.linspace, dtype=torch.float64, device="cpu")
  curve = torch.cos((linspace(0, 1, NUM_TIMESTEPS + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
  betas = {
    "scaled_linear": linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS) ** 2,
    "linear": linspace(0.00085, 0.012, NUM_TIMESTEPS),
    # From ratios of the curve, cut at 0.999, where the last one would be 1 and ᾱ(T-1) exactly 0.
    "cosine": (1 - curve[1:] / curve[:-1]).clamp(max=0.999),
  }
  return F.pad(torch.cumprod(1 - betas[schedule], dim=0), (0, 1), value=1.0)


def trailing(steps: int) -> list[int]:
  """The timesteps of `steps` DDIM steps, from T-1 down, and -1 for the data: 999, 666, 332, -1 for three."""
  if not 1 <= steps <= NUM_TIMESTEPS:
    raise ValueError(f"steps is {steps}; it must be 1 to {NUM_TIMESTEPS}")
  # From T down, so that the first step is always at T-1, where e_T is noise. A fractional stride may give an entry too
  # many.
  t = torch.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / steps, dtype=torch.float64).round().long()
  return [*(t[:steps] - 1).tolist(), -1]


def attend(q: Tokens, k: Tokens, v: Tokens, *, num_heads: int) -> Tokens:
  q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
  return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mlp(din: int, hidden: int, dout: int, activation: nn.Module) -> nn.Sequential:
  return nn.Sequential(OrderedDict(fc1=nn.Linear(din, hidden), activation=activation, fc2=nn.Linear(hidden, dout)))


class Attention(nn.Module):
  def __init__(self, width: int, *, num_heads: int, qkv_bias: bool):
    super().__init__()
    self.num_heads = num_heads
    self.q, self.k, self.v = (nn.Linear(width, width, bias=qkv_bias) for _ in range(3))
    self.out = nn.Linear(width, width)

  def forward(self, x: Tokens) -> Tokens:
    return self.out(attend(self.q(x), self.k(x), self.v(x), num_heads=self.num_heads))


class GEGLU(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.proj = nn.Linear(width, 8 * width)
    self.out = nn.Linear(4 * width, width)

  def forward(self, x: Query) -> Query:
    value, gate = self.proj(x).chunk(2, dim=-1)
    return self.out(value * F.gelu(gate))


class FusionBlock(nn.Module):
  """The paper's Figure 3: the text token's own parameters beside one of Stable Diffusion's attention blocks.

  Without `share_attention` the text token has its own q, k, v, out; without `modality_ffn` it uses the image's norm and
  feed-forward network (Table 5).
  """

  def __init__(self, image_block: Part, query_width: int, *, share_attention: bool, modality_ffn: bool):
    super().__init__()
    width, num_heads = image_block.proj_in.out_channels, image_block.transformer_blocks[0].attn1.heads
    self.fc_in = nn.Linear(query_width, width)
    self.attn = None if share_attention else Attention(width, num_heads=num_heads, qkv_bias=False)
    self.norm = nn.LayerNorm(width) if modality_ffn else None
    self.ff = GEGLU(width) if modality_ffn else None
    self.fc_out = nn.Linear(width, query_width)

  def forward(self, image_block: Part, x: Features, c: Tokens, h_e: Query, e_t: Query) -> Streams:
    """Image features and hidden text query h_e, each updated. `e_t` is time-conditioned and added again here."""
    block = image_block.transformer_blocks[0]
    u = self.fc_in(h_e + e_t)
    image = image_block.proj_in(image_block.norm(x)).flatten(2).transpose(1, 2)
    tokens = torch.cat([u[:, None], image], dim=1)
    tokens = tokens + self._joint_attention(block.attn1, block.norm1(tokens))

    u, image = tokens[:, 0], tokens[:, 1:]
    # In Stable Diffusion's order. The text token skips cross-attention: it is the text.
    image = image + block.attn2(block.norm2(image), encoder_hidden_states=c)  # the text token takes none
    image = image + block.ff(block.norm3(image))
    norm = block.norm3 if self.norm is None else self.norm
    ff = block.ff if self.ff is None else self.ff
    u = u + ff(norm(u))
    return Streams(x + image_block.proj_out(image.transpose(1, 2).reshape(x.shape)), self.fc_out(u))

  def _joint_attention(self, attn1: Part, tokens: Tokens) -> Tokens:
    """Stable Diffusion's self-attention, with one more token."""
    if self.attn is None:
      return attn1(tokens)
    # Own projections, but one attention: the text token sees the image's keys, and the image the text token's.
    pairs = ((self.attn.q, attn1.to_q), (self.attn.k, attn1.to_k), (self.attn.v, attn1.to_v))
    qkv = (self._side_by_side(text, image, tokens) for text, image in pairs)
    return self._side_by_side(self.attn.out, attn1.to_out[0], attend(*qkv, num_heads=attn1.heads))

  @staticmethod
  def _side_by_side(text: Part, image: Part, x: Tokens) -> Tokens:
    return torch.cat([text(x[:, :1]), image(x[:, 1:])], dim=1)


class TextStream(nn.Module):
  """Embedder of t_e, and one FusionBlock for each of `image_blocks`: none where fusion is off (Table 4)."""

  def __init__(self, image_blocks: Sequence[Part], query_width: int, **switches: bool):
    super().__init__()
    self.embedder = mlp(query_width, query_width, query_width, nn.SiLU())
    self.blocks = nn.ModuleList(FusionBlock(block, query_width, **switches) for block in image_blocks)

  def time_conditioned(self, e_t: Query, t_e: Timesteps) -> Query:
    """e_t + Embedder(t_e)"""
    sinusoid = get_timestep_embedding(t_e, e_t.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return e_t + self.embedder(sinusoid.to(e_t.dtype))


class TransformerLayer(nn.Module):
  def __init__(self, width: int, *, num_heads: int):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attn = Attention(width, num_heads=num_heads, qkv_bias=True)
    self.mlp = mlp(width, 4 * width, width, nn.GELU())

  def forward(self, x: Tokens) -> Tokens:
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class AlignmentTransformer(nn.Module):
  """Transformer over [text token, middle feature map], and a linear predictor on the text token."""

  def __init__(
    self, *, query_width: int, image_width: int, width: int, depth: int, num_heads: int, spatial_pool: int = 0
  ):
    super().__init__()
    self.text_in, self.image_in = nn.Linear(query_width, width), nn.Linear(image_width, width)
    self.layers = nn.ModuleList(TransformerLayer(width, num_heads=num_heads) for _ in range(depth))
    self.norm = nn.LayerNorm(width)
    self.predictor = nn.Linear(width, query_width)
    self.spatial_pool = spatial_pool
    if spatial_pool:
      self.map_norm, self.map_out = nn.LayerNorm(image_width), nn.Linear(spatial_pool**2 * image_width, query_width)

  def forward(self, h_e: Query, features: Features) -> Query:
    tokens = torch.cat([self.text_in(h_e)[:, None], self.image_in(features.flatten(2).transpose(1, 2))], dim=1)
    for layer in self.layers:
      tokens = layer(tokens)
    query = self.predictor(self.norm(tokens[:, 0]))
    return query + self.from_map(features) if self.spatial_pool else query

  def from_map(self, features: Features) -> Query:
    """What the layout of the middle feature map adds: its means over parts, a matrix for each."""
    normed = self.map_norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return self.map_out(F.adaptive_avg_pool2d(normed, self.spatial_pool).permute(0, 2, 3, 1).flatten(1))


class DiffDis(nn.Module):
  """Stable Diffusion's UNet as an aligner of images and texts. `config` is diffdis_config.json, above."""

  def __init__(self, config: Mapping[str, Any], *, unet: Part, vae: Part, text_encoder: Part):
    super().__init__()
    self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
    model, text, process = config["model"], config["model"]["text_encoder"], config["text_diffusion"]
    self.bos_id, self.eos_id, self.max_length = text["bos_id"], text["eos_id"], config["max_length"]
    self.target, self.gamma, self.alpha_bar = process["target"], process["gamma"], alpha_bar(process["schedule"])
    self.condition_timestep = config["condition_timestep"]
    self.normalize_query = config.get("inference", {}).get("normalize_query", True)
    self.query_width = text["projection"] or text["width"]
    self.token_embedding_weight = text.get("token_embedding_weight", 0.0)
    self.query_tokens = nn.Embedding(text["vocab_size"], text["width"]) if self.token_embedding_weight else None

    levels = [level for level in unet.down_blocks if isinstance(level, CrossAttnDownBlock2D)]
    image_blocks = [block for level in [*levels, unet.mid_block] for block in level.attentions]
    switches = {name: model[name] for name in ("share_attention", "modality_ffn")}
    self.text_stream = TextStream(image_blocks if model["fusion"] else (), self.query_width, **switches)
    image_width = unet.config.block_out_channels[-1]
    self.alignment = AlignmentTransformer(query_width=self.query_width, image_width=image_width, **model["alignment"])
    self.text_projection = nn.Linear(text["width"], self.query_width, bias=False) if text["projection"] else None
    self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

  @classmethod
  def from_pretrained(cls, folder: str | pathlib.Path) -> DiffDis:
    """The model in an exported folder, f32, in evaluation mode.

    Raises:
      ValueError: diffdis.safetensors and diffdis_config.json do not fit each other.
    """
    folder = pathlib.Path(folder)
    # By class, not by the pipeline, whose scheduler and tokenizer are not needed here.
    kinds = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)
    parts = {name: kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items()}
    model = cls(json.loads((folder / "diffdis_config.json").read_text()), **parts)
    # Not strict: diffusers' own parts were loaded by their own files above, and are not in this one.
    keys = model.load_state_dict(load_file(folder / "diffdis.safetensors"), strict=False)
    missing = [key for key in keys.missing_keys if key.split(".")[0] not in parts]
    if missing or keys.unexpected_keys:
      raise ValueError(f"diffdis.safetensors lacks {missing} and has unknown {keys.unexpected_keys}; export again")
    return model.float().eval()

  def encode_image(self, pixels: Float[Tensor, "b 3 H W"]) -> Features:
    """Latents z of images in [-1, 1]: the posterior's mode, scaled."""
    return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode() * self.vae.config.scaling_factor

  @torch.no_grad()
  def embed_text(self, input_ids: Int[Tensor, "b l"]) -> Query:
    """Text queries e: the condition at the first end-of-text token, through the projection if any, L2-normalised.

    With `query_tokens` the mean of the caption's tokens' vectors there is added to that condition, times
    `token_embedding_weight`.
    """
    # The first one: padding is the end-of-text token too.
    end = (input_ids == self.eos_id).int().argmax(dim=1)
    query = self.text_encoder(input_ids).last_hidden_state[torch.arange(len(input_ids)), end]
    if self.query_tokens is not None:
      place = torch.arange(input_ids.shape[1], device=input_ids.device)
      inside = ((place > 0) & (place < end[:, None])).to(query.dtype)
      total = (inside[..., None] * self.query_tokens(input_ids)).sum(dim=1)
      query = query + self.token_embedding_weight * total / inside.sum(dim=1, keepdim=True).clamp(min=1)
    return F.normalize((query if self.text_projection is None else self.text_projection(query)).float(), dim=-1)

  def predict(self, z: Features, e_t: Query, t_e: Timesteps) -> Query:
    """Φ_θ(e_t, t_e, z): ê_0 or ε̂_e, as the run's target says. The UNet's up path does not run.

    The image is clean, which its own timestep says: 1000, one past the generative range (Table 7). Its text condition
    is the empty prompt's, so that no caption leaks.
    """
    unet, dtype = self.unet, self.unet.dtype
    temb = unet.time_embedding(unet.time_proj(torch.full_like(t_e, self.condition_timestep)).to(dtype))
    null = torch.tensor([[self.bos_id] + [self.eos_id] * (self.max_length - 1)], device=z.device)
    c = self.text_encoder(null).last_hidden_state.expand(len(z), -1, -1)
    e_t = self.text_stream.time_conditioned(e_t.to(dtype), t_e)
    fusion_blocks = iter(self.text_stream.blocks)

    def attention(image_block: Part, h: Features, h_e: Query) -> Streams:
      if not self.text_stream.blocks:
        return Streams(image_block(h, encoder_hidden_states=c, return_dict=False)[0], h_e)
      return next(fusion_blocks)(image_block, h, c, h_e, e_t)

    # h_e starts at 0, and each block adds e_t. The order of blocks is UNet2DConditionModel.forward's, skips left out.
    h, h_e = unet.conv_in(z.to(dtype)), torch.zeros_like(e_t)
    for level in unet.down_blocks:
      for i, resnet in enumerate(level.resnets):
        h = resnet(h, temb)
        if isinstance(level, CrossAttnDownBlock2D):
          h, h_e = attention(level.attentions[i], h, h_e)
      for downsample in level.downsamplers or ():
        h = downsample(h)
    h = unet.mid_block.resnets[0](h, temb)
    h, h_e = attention(unet.mid_block.attentions[0], h, h_e)
    h = unet.mid_block.resnets[1](h, temb)
    # Without fusion the query meets the image here alone.
    return self.alignment(h_e if self.text_stream.blocks else e_t, h).float()

  def predict_query(self, z: Features, e_t: Query, t_e: Timesteps) -> Query:
    """ê_0, whatever the target: from the noise, ê_0 = (e_t − √(1−ᾱ) ε̂_e) / (γ √ᾱ). Not normalised.

    Args:
      z: clean latents.
      e_t: noised text query, γ √ᾱ e + √(1−ᾱ) ε.
      t_e: its timestep, 0 to 999.
    """
    prediction = self.predict(z, e_t, t_e)
    if self.target == "data":
      return prediction
    signal, sigma = self._rates(t_e)
    return (e_t - sigma * prediction) / (self.gamma * signal)

  @torch.no_grad()
  def embed_image(self, z: Features, steps: int, noise: Query) -> Query:
    """The denoised text query, L2-normalised: `steps` DDIM steps from e_T = noise ~ N(0, I) (the paper's Algorithm 3).

    The paper uses one step, the prediction at T-1. To average several noise samples, average their results and
    normalise again. Never start from a caption's own noised query.

    With target `data` and `normalize_query`, each step's ê_0 is normalised before it is fed back, since the process is
    defined on vectors of length 1. With target `noise` it follows from the predicted noise, and stays what it is.

    Raises:
      ValueError: not 1 to 1000 steps.
    """
    e_t, timesteps = noise, trailing(steps)
    for t, t_prev in zip(timesteps[:-1], timesteps[1:], strict=True):
      t_e = torch.full((len(z),), t, device=z.device)
      e_0 = self.predict_query(z, e_t, t_e)
      # Before ε is taken from it, so that both together still make e_t.
      if self.normalize_query and self.target == "data":
        e_0 = F.normalize(e_0, dim=-1)
      signal, sigma = self._rates(t_e)
      epsilon = (e_t - self.gamma * signal * e_0) / sigma
      signal, sigma = self._rates(torch.full_like(t_e, t_prev))
      e_t = self.gamma * signal * e_0 + sigma * epsilon
    return F.normalize(e_t, dim=-1)

  def similarity(self, image: Float[Tensor, "n d"], text: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Logits τ ⟨ê_0, e⟩ of image queries and text queries, τ = min(exp(logit_scale), 100)."""
    return self.logit_scale.exp().clamp(max=100) * image @ text.T

  def _rates(self, t: Timesteps) -> Rates:
    a = self.alpha_bar[t.cpu()][:, None]
    # The roots in float64, and only then f32: 1 − ᾱ of a small t would lose its digits.
    return Rates(a.sqrt().float().to(t.device), (1 - a).sqrt().float().to(t.device))
