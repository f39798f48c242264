"""DiffDis for PyTorch: the discriminative half of the method, with diffusers' UNet2DConditionModel.

It needs only torch and diffusers. export_weights copies this file to `diffdis/torch_diffdis.py` of an export, from
which diffusers loads it as the component `diffdis` of DiffDisPipeline (pipeline.py), whose methods call it. The
component has the parts that DiffDis adds to Stable Diffusion; UNet and text encoder are arguments.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

Query = Tensor  # [b, e]
Tokens = Tensor  # [b, n, d]
Features = Tensor  # [b, c, h, w]
Timesteps = Tensor  # [b]
Part = Any  # a module of diffusers or transformers; in nn.Module's annotations, any attribute may be a Tensor
NUM_TIMESTEPS = 1000


class Streams(NamedTuple):
  """The outputs of a block: image features, and the text token's hidden state h_e."""

  image: Features
  h_e: Query


def alpha_bar(schedule: str) -> Tensor:
  """Return ᾱ(t) of a noise schedule, float64. Its last entry, at t = -1, is 1 for the data."""
  # float64 makes a sampler's coefficients exact; on the CPU, since not every device has it.
  linspace = functools.partial(torch.linspace, dtype=torch.float64, device="cpu")
  curve = torch.cos((linspace(0, 1, NUM_TIMESTEPS + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
  betas = {
    "scaled_linear": linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS) ** 2,
    "linear": linspace(0.00085, 0.012, NUM_TIMESTEPS),
    # β from ratios of the curve, at most 0.999: the last one would be 1, and ᾱ(T-1) exactly 0.
    "cosine": (1 - curve[1:] / curve[:-1]).clamp(max=0.999),
  }
  return F.pad(torch.cumprod(1 - betas[schedule], dim=0), (0, 1), value=1.0)


def trailing(steps: int) -> list[int]:
  """Return the timesteps of `steps` DDIM steps, from T-1 down, and -1 for the data: 999, 666, 332, -1 for three."""
  if not 1 <= steps <= NUM_TIMESTEPS:
    raise ValueError(f"steps is {steps}; it must be 1 to {NUM_TIMESTEPS}")
  # From T down, so that the first step is at T-1, where e_T is noise. A fractional stride may give one entry too many.
  t = torch.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / steps, dtype=torch.float64, device="cpu").round().long()
  return [*(t[:steps] - 1).tolist(), -1]


def onload(*parts: Part) -> None:
  """Let accelerate move parts to the device, as it does before their `forward`, since only their layers are called."""
  for part in parts:
    if hasattr(part, "_hf_hook"):
      part._hf_hook.pre_forward(part)


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
  """The text token's own parameters at an attention block of Stable Diffusion (the paper's Figure 3).

  Without `share_attention` the text token has its own q, k, v, out. Without `modality_ffn` it uses the image's norm and
  feed-forward network (Table 5).
  """

  def __init__(self, width: int, query_width: int, *, num_heads: int, share_attention: bool, modality_ffn: bool):
    super().__init__()
    self.fc_in = nn.Linear(query_width, width)
    self.attn = None if share_attention else Attention(width, num_heads=num_heads, qkv_bias=False)
    self.norm = nn.LayerNorm(width) if modality_ffn else None
    self.ff = GEGLU(width) if modality_ffn else None
    self.fc_out = nn.Linear(width, query_width)

  def forward(self, image_block: Part, x: Features, c: Tokens, h_e: Query, e_t: Query) -> Streams:
    """Return the updated image features and hidden text query h_e. `e_t` is time-conditioned, and added to h_e."""
    block = image_block.transformer_blocks[0]
    u = self.fc_in(h_e + e_t)
    image = image_block.proj_in(image_block.norm(x)).flatten(2).transpose(1, 2)
    tokens = torch.cat([u[:, None], image], dim=1)
    tokens = tokens + self._joint_attention(block.attn1, block.norm1(tokens))

    u, image = tokens[:, 0], tokens[:, 1:]
    # The image stream has Stable Diffusion's order. The text token has no cross-attention.
    image = image + block.attn2(block.norm2(image), encoder_hidden_states=c)
    image = image + block.ff(block.norm3(image))
    norm = block.norm3 if self.norm is None else self.norm
    ff = block.ff if self.ff is None else self.ff
    u = u + ff(norm(u))
    return Streams(x + image_block.proj_out(image.transpose(1, 2).reshape(x.shape)), self.fc_out(u))

  def _joint_attention(self, attn1: Part, tokens: Tokens) -> Tokens:
    """Run Stable Diffusion's self-attention with the text token as one more token."""
    if self.attn is None:
      return attn1(tokens)

    def side_by_side(text: Part, image: Part, x: Tokens) -> Tokens:
      return torch.cat([text(x[:, :1]), image(x[:, 1:])], dim=1)

    # The text token has its own projections, but both streams attend to the keys of both.
    pairs = ((self.attn.q, attn1.to_q), (self.attn.k, attn1.to_k), (self.attn.v, attn1.to_v))
    qkv = (side_by_side(text, image, tokens) for text, image in pairs)
    return side_by_side(self.attn.out, attn1.to_out[0], attend(*qkv, num_heads=attn1.heads))


class TextStream(nn.Module):
  """The embedder of t_e, and a FusionBlock for each width in `widths`, of which there is none without fusion."""

  def __init__(self, widths: Sequence[int], query_width: int, **how: Any):
    super().__init__()
    self.embedder = mlp(query_width, query_width, query_width, nn.SiLU())
    self.blocks = nn.ModuleList(FusionBlock(width, query_width, **how) for width in widths)

  def time_conditioned(self, e_t: Query, t_e: Timesteps) -> Query:
    """Return e_t + Embedder(t_e)."""
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
  """A transformer over [text token, middle feature map], and a linear predictor on the text token."""

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
    """Return the part of the query from the map's layout: a matrix for the mean of each part of the map."""
    normed = self.map_norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return self.map_out(F.adaptive_avg_pool2d(normed, self.spatial_pool).permute(0, 2, 3, 1).flatten(1))


class DiffDis(ModelMixin, ConfigMixin):
  """The parts that DiffDis adds to Stable Diffusion's UNet in order to align images and texts.

  Args:
    model, text_diffusion, condition_timestep, image_size, inference: fields of the run's config.
    max_length (`int`): the number of tokens of a text.
    image_diffusion, objectives: fields of the run's config that are not used here.
  """

  # The code for the pipeline's `save_pretrained`. diffusers overwrites its copy when it loads another model's file.
  source = pathlib.Path(__file__).read_text(encoding="utf-8")

  @register_to_config
  def __init__(
    self,
    model: Mapping[str, Any],
    text_diffusion: Mapping[str, Any],
    condition_timestep: int,
    max_length: int,
    image_size: int = 512,
    inference: Mapping[str, Any] | None = None,
    image_diffusion: Mapping[str, Any] | None = None,
    objectives: Sequence[str] = (),
  ):
    super().__init__()
    unet, text, process = model["unet"], model["text_encoder"], text_diffusion
    self.bos_id, self.eos_id, self.max_length = text["bos_id"], text["eos_id"], max_length
    self.target, self.gamma, self.alpha_bar = process["target"], process["gamma"], alpha_bar(process["schedule"])
    self.condition_timestep, self.image_size = condition_timestep, image_size
    self.sampling = dict(steps=1, num_noise_samples=1, guidance=1.0, normalize_query=True) | dict(inference or {})
    self.query_width = text["projection"] or text["width"]
    self.token_embedding_weight = text.get("token_embedding_weight", 0.0)
    self.query_tokens = nn.Embedding(text["vocab_size"], text["width"]) if self.token_embedding_weight else None

    levels = zip(unet["widths"], unet["attention"], strict=True)
    widths = [width for width, has in levels if has for _ in range(unet["depth"])]
    last = unet["widths"][-1]  # the width of the middle, which always has attention
    how = {name: model[name] for name in ("share_attention", "modality_ffn")} | {"num_heads": unet["num_heads"]}
    self.text_stream = TextStream([*widths, last] if model["fusion"] else (), self.query_width, **how)
    self.alignment = AlignmentTransformer(query_width=self.query_width, image_width=last, **model["alignment"])
    self.text_projection = nn.Linear(text["width"], self.query_width, bias=False) if text["projection"] else None
    self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

  @classmethod
  def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    """Load like diffusers' models, but raise ValueError for a missing or an unknown parameter."""
    asked = kwargs.pop("output_loading_info", False)
    model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)  # pyright: ignore
    # diffusers only warns, and initialises missing parameters at random.
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unknown:
      where = pretrained_model_name_or_path
      raise ValueError(f"the weights in {where} lack {missing} and have unknown {unknown}; export again")
    return (model, info) if asked else model

  @torch.no_grad()
  def null_condition(self, text_encoder: Part, device: torch.device | str | None = None) -> Tensor:
    """Return c of the empty prompt, [1, l, d]. `device` is that of the text encoder, if it is offloaded."""
    null = [[self.bos_id] + [self.eos_id] * (self.max_length - 1)]
    return text_encoder(torch.tensor(null, device=device or text_encoder.device)).last_hidden_state

  @torch.no_grad()
  def embed_text(self, input_ids: Tensor, *, text_encoder: Part) -> Query:
    """Return text queries e: the condition at the first end-of-text token, optionally projected, L2-normalised.

    With `query_tokens`, the mean of the tokens' embeddings times `token_embedding_weight` is added to the condition.
    """
    onload(self)
    # The first one counts: padding is also the end-of-text token.
    end = (input_ids == self.eos_id).int().argmax(dim=1)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    query = text_encoder(input_ids).last_hidden_state[rows, end].to(self.dtype)
    if self.query_tokens is not None:
      place = torch.arange(input_ids.shape[1], device=input_ids.device)
      inside = ((place > 0) & (place < end[:, None])).to(query.dtype)
      total = (inside[..., None] * self.query_tokens(input_ids)).sum(dim=1)
      query = query + self.token_embedding_weight * total / inside.sum(dim=1, keepdim=True).clamp(min=1)
    return F.normalize((query if self.text_projection is None else self.text_projection(query)).float(), dim=-1)

  def predict(self, z: Features, e_t: Query, t_e: Timesteps, *, unet: Part, c_null: Tensor) -> Query:
    """Compute ê_0 or ε̂_e = Φ_θ(e_t, t_e, z), depending on the run's target. The UNet's up path does not run.

    The latents z are clean, so the UNet's timestep is 1000, one beyond those of generation (Table 7). The text
    condition is the empty prompt's, so that no caption leaks. `e_t` is the noised query, γ √ᾱ e + √(1−ᾱ) ε, at t_e.
    """
    onload(unet, self)
    dtype = unet.dtype
    temb = unet.time_embedding(unet.time_proj(torch.full_like(t_e, self.condition_timestep)).to(dtype))
    c = c_null.to(dtype).expand(len(z), -1, -1)
    e_t = self.text_stream.time_conditioned(e_t.to(self.dtype), t_e)
    fusion_blocks = iter(self.text_stream.blocks)

    def attention(image_block: Part, h: Features, h_e: Query) -> Streams:
      if not self.text_stream.blocks:
        return Streams(image_block(h, encoder_hidden_states=c, return_dict=False)[0], h_e)
      return next(fusion_blocks)(image_block, h, c, h_e, e_t)

    # h_e starts at 0, and each block adds e_t. The order of blocks is UNet2DConditionModel.forward's, without skips.
    h, h_e = unet.conv_in(z.to(dtype)), torch.zeros_like(e_t)
    for level in unet.down_blocks:
      attentions = iter(getattr(level, "attentions", ()))
      for resnet in level.resnets:
        h = resnet(h, temb)
        if (block := next(attentions, None)) is not None:
          h, h_e = attention(block, h, h_e)
      for downsample in level.downsamplers or ():
        h = downsample(h)
    h = unet.mid_block.resnets[0](h, temb)
    h, h_e = attention(unet.mid_block.attentions[0], h, h_e)
    h = unet.mid_block.resnets[1](h, temb)
    # Without fusion, query and image interact only here.
    return self.alignment(h_e if self.text_stream.blocks else e_t, h).float()

  def to_query(self, prediction: Query, e_t: Query, t_e: Timesteps) -> Query:
    """Return ê_0 of a prediction. From predicted noise it is (e_t − √(1−ᾱ) ε̂_e) / (γ √ᾱ)."""
    if self.target == "data":
      return prediction
    signal, sigma = self._rates(t_e)
    return (e_t - sigma * prediction) / (self.gamma * signal)

  @torch.no_grad()
  def embed_image(
    self, z: Features, noise: Query, *, unet: Part, c_null: Tensor, steps: int = 1, guidance: float = 1.0
  ) -> Query:
    """Return the denoised text query, L2-normalised: `steps` DDIM steps from e_T = noise (the paper's Algorithm 3).

    The paper uses one step, the prediction at T-1. With target `data` and `normalize_query`, each step's ê_0 is
    normalised before it is fed back, since the process is defined for vectors of length 1. The null condition of
    guidance is the image z = 0.
    """
    e_t, timesteps = noise, trailing(steps)
    for t, t_prev in zip(timesteps[:-1], timesteps[1:], strict=True):
      t_e = torch.full((len(z),), t, device=z.device)
      prediction = self.predict(z, e_t, t_e, unet=unet, c_null=c_null)
      if guidance != 1:
        null = self.predict(torch.zeros_like(z), e_t, t_e, unet=unet, c_null=c_null)
        prediction = null + guidance * (prediction - null)
      e_0 = self.to_query(prediction, e_t, t_e)
      # Normalise before ε is computed from ê_0, so that both together still give e_t.
      if self.sampling["normalize_query"] and self.target == "data":
        e_0 = F.normalize(e_0, dim=-1)
      signal, sigma = self._rates(t_e)
      epsilon = (e_t - self.gamma * signal * e_0) / sigma
      signal, sigma = self._rates(torch.full_like(t_e, t_prev))
      e_t = self.gamma * signal * e_0 + sigma * epsilon
    return F.normalize(e_t, dim=-1)

  @torch.no_grad()
  def similarity(self, image: Tensor, text: Tensor) -> Tensor:
    """Return the logits τ ⟨ê_0, e⟩, [n, m], of n image and m text queries, with τ = min(exp(logit_scale), 100)."""
    return self.logit_scale.float().exp().clamp(max=100) * image @ text.T

  def _rates(self, t: Timesteps) -> list[Tensor]:
    """Return √ᾱ(t) and √(1 − ᾱ(t)), f32 of shape [b, 1]."""
    a = self.alpha_bar[t.cpu()][:, None]
    # Roots are taken in float64: 1 − ᾱ in f32 would lose digits at small t.
    return [x.sqrt().float().to(t.device) for x in (a, 1 - a)]
