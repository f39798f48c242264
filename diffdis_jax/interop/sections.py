"""Read and write config.json of diffusers' and transformers' models by one table of fields.

Without a config.json, the sizes come from the shapes of a checkpoint's tensors. Head counts, groups and activations do
not show in shapes: they are taken to be those of Stable Diffusion v1 and of published CLIPs.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffdis_jax.errors import UserError
from diffdis_jax.interop.tensor_files import Tensors

Config = Mapping[str, Any]

# (our field, their field, the library's default if config.json lacks it). diffusers uses `attention_head_dim` for the
# number of heads of Stable Diffusion v1.
Fields = tuple[tuple[str, str, Any], ...]
UNET: Fields = (
  ("widths", "block_out_channels", (320, 640, 1280, 1280)),
  ("depth", "layers_per_block", 2),
  ("num_heads", "attention_head_dim", 8),
  ("groups", "norm_num_groups", 32),
)
VAE: Fields = (
  ("widths", "block_out_channels", (64,)),
  ("depth", "layers_per_block", 1),
  ("latent_channels", "latent_channels", 4),
  ("groups", "norm_num_groups", 32),
  ("attention", "mid_block_add_attention", True),
  ("scale", "scaling_factor", 0.18215),
)
TEXT: Fields = (
  ("vocab_size", "vocab_size", 49408),
  ("max_length", "max_position_embeddings", 77),
  ("width", "hidden_size", 512),
  ("depth", "num_hidden_layers", 12),
  ("num_heads", "num_attention_heads", 8),
  ("mlp_width", "intermediate_size", 2048),
  ("activation", "hidden_act", "quick_gelu"),
)
VISION: Fields = (
  ("image_size", "image_size", 224),
  ("patch", "patch_size", 32),
  ("width", "hidden_size", 768),
  ("depth", "num_hidden_layers", 12),
  ("num_heads", "num_attention_heads", 12),
  ("mlp_width", "intermediate_size", 3072),
  ("activation", "hidden_act", "quick_gelu"),
)

# Their fields that have the same fixed value in Stable Diffusion v1 and here.
FIXED_UNET = dict(
  act_fn="silu",
  flip_sin_to_cos=True,
  mid_block_type="UNetMidBlock2DCrossAttn",
  norm_eps=1e-5,
  freq_shift=0,
  resnet_time_scale_shift="default",
  **dict.fromkeys(("downsample_padding", "mid_block_scale_factor", "transformer_layers_per_block"), 1),
  **dict.fromkeys(("center_input_sample", "only_cross_attention", "dual_cross_attention"), False),
  **dict.fromkeys(("class_embed_type", "num_class_embeds", "addition_embed_type"), None),
  **dict.fromkeys(("encoder_hid_dim", "time_cond_proj_dim"), None),
)
FIXED_VAE = dict(
  act_fn="silu",
  **dict.fromkeys(("shift_factor", "latents_mean", "latents_std"), None),
  **dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), True),
)
FIXED_TEXT = dict(layer_norm_eps=1e-5)
FIXED_VISION = dict(layer_norm_eps=1e-5, num_channels=3)
PATCHES = "PatchAutoencoderKL"
FIXED_SCHEDULER = dict(num_train_timesteps=1000, prediction_type="epsilon", trained_betas=None)
FIXED_SCHEDULER |= dict(rescale_betas_zero_snr=False)

ACTIVATIONS = ("quick_gelu", "gelu")
CLIP_HEAD_WIDTH = 64  # the width of a head of every published text tower
MOST_VISION_HEADS = 16  # beyond ViT-L the heads of published vision towers are wider: 80 in ViT-H, 104 in ViT-bigG
# Our noise schedule -> theirs. The range of betas is fixed, and the cosine schedule does not use it.
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
BETAS = dict(beta_start=0.00085, beta_end=0.012)
DIFFUSERS_BETAS = dict(beta_start=0.0001, beta_end=0.02)  # the defaults of a scheduler_config.json
# Stable Diffusion's DDIM steps: multiples of T / n, offset by one, down to ᾱ(0).
SAMPLER = dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False, timestep_spacing="leading")


def unsupported(where: str, field: str, value: Any, wanted: str) -> UserError:
  """Return the error for a config's field with an unsupported value; `wanted` names the supported ones."""
  return UserError(f"{where}: {field} is {value!r}; {wanted}")


def read_unet(config: Config, where: str) -> dict[str, Any]:
  """Return `model.unet`. For unsupported values, these functions raise a UserError that begins with `where`."""
  section = _read(config, UNET, FIXED_UNET, where)
  # The names of the down blocks show which levels have attention; those of the up blocks must mirror them.
  names = config.get("down_block_types", _unet_blocks((True, True, True, False))["down_block_types"])
  attention = tuple(name == "CrossAttnDownBlock2D" for name in names)
  _require(config, _unet_blocks(attention), where)
  return dict(section, attention=attention)


def write_unet(section: Config, *, latent_channels: int, context_width: int, sample_size: int) -> dict[str, Any]:
  own = _write(section, UNET, FIXED_UNET) | _unet_blocks(section["attention"])
  own |= dict(in_channels=latent_channels, out_channels=latent_channels, cross_attention_dim=context_width)
  return dict(_class_name="UNet2DConditionModel", **own, sample_size=sample_size)


def read_vae(config: Config, where: str) -> dict[str, Any]:
  """Return `model.autoencoder`."""
  section = _read(config, VAE, FIXED_VAE, where)
  # In an export's autoencoder with patches (torch_parts.py), the pixels of a patch are channels.
  patch = math.isqrt(max(config.get("in_channels", 3) // 3, 1)) if config.get("_class_name") == PATCHES else 1
  _require(config, _vae_blocks(section, patch), where)
  return dict(section, patch=patch, shift=0.0)


def write_vae(section: Config, *, scaling_factor: float, sample_size: int) -> dict[str, Any]:
  own = _write(dict(section, scale=scaling_factor), VAE, FIXED_VAE) | _vae_blocks(section, section["patch"])
  return dict(_class_name="AutoencoderKL", **own, sample_size=sample_size)


def read_text(config: Config, where: str) -> dict[str, Any]:
  """Return `model.text_encoder` without the ids of start and end, which are wrong in old config.json files."""
  return _read(config, TEXT, FIXED_TEXT, where)


def write_text(section: Config) -> dict[str, Any]:
  tokens = dict(bos_token_id=section["bos_id"], eos_token_id=section["eos_id"], pad_token_id=section["eos_id"])
  own = _write(section, TEXT, FIXED_TEXT) | tokens
  return dict(architectures=["CLIPTextModel"], model_type="clip_text_model", **own)


def read_vision(config: Config, where: str) -> dict[str, Any]:
  """Return `model.vision_encoder` without its projection."""
  return _read(config, VISION, FIXED_VISION, where)


def write_clip(text: Config, vision: Config) -> dict[str, Any]:
  """Return the config.json of transformers' CLIPModel for `model.text_encoder` and `model.vision_encoder`."""
  projection = dict(projection_dim=text["projection"])
  return dict(
    architectures=["CLIPModel"],
    model_type="clip",
    **projection,
    text_config={name: x for name, x in write_text(text).items() if name != "architectures"} | projection,
    vision_config=dict(model_type="clip_vision_model", **_write(vision, VISION, FIXED_VISION), **projection),
  )


def check_widths(unet: Config, model: Config, where: str) -> None:
  """Raise UserError unless the UNet's inputs are the autoencoder's latents and the text tower's condition."""
  channels, width = model["autoencoder"]["latent_channels"], model["text_encoder"]["width"]
  _require(unet, dict(in_channels=channels, out_channels=channels, cross_attention_dim=width), where)


def read_scheduler(config: Config, where: str) -> str:
  """Return `image_diffusion.schedule`."""
  _require(config, FIXED_SCHEDULER, where)
  theirs = config.get("beta_schedule", "linear")
  ours = next((ours for ours, name in SCHEDULES.items() if name == theirs), None)
  if ours is None:
    raise unsupported(where, "beta_schedule", theirs, f"it must be one of {', '.join(SCHEDULES.values())}")
  # `method/schedules.py` has only Stable Diffusion's range of betas. A cosine schedule does not use it.
  if ours != "cosine":
    _require({**DIFFUSERS_BETAS, **config}, BETAS, where)
  return ours


def write_scheduler(schedule: str) -> dict[str, Any]:
  return dict(_class_name="DDIMScheduler", **FIXED_SCHEDULER, **BETAS, **SAMPLER, beta_schedule=SCHEDULES[schedule])


def _read(config: Config, fields: Fields, fixed: Config, where: str) -> dict[str, Any]:
  _require(config, fixed, where)
  section = {}
  for ours, theirs, default in fields:
    value = config.get(theirs, default)
    # JSON has lists where a config has tuples. A float may be written as a whole number; a bool is no number here.
    value = tuple(value) if isinstance(value, list) else value
    if type(value) is not type(default) and not (type(default) is float and type(value) is int):
      raise unsupported(where, theirs, value, f"it should be a value such as {default!r}")
    if theirs == "hidden_act" and value not in ACTIVATIONS:
      raise unsupported(where, theirs, value, f"it must be one of {', '.join(ACTIVATIONS)}")
    section[ours] = value
  return section


def _write(section: Config, fields: Fields, fixed: Config) -> dict[str, Any]:
  return {**fixed, **{theirs: section[ours] for ours, theirs, _ in fields}}


def _require(config: Config, expected: Config, where: str) -> None:
  for field, value in expected.items():
    # A missing field, as in old files, has the library's default, which is this value.
    given = config.get(field, value)
    if (tuple(given) if isinstance(given, list) else given) != value:
      raise unsupported(where, field, given, f"Stable Diffusion v1 and this package have {value!r}")


def _unet_blocks(attention: Sequence[bool]) -> dict[str, Any]:
  down, up = (tuple(f"{'CrossAttn' * has}{way}Block2D" for has in attention) for way in ("Down", "Up"))
  return dict(down_block_types=down, up_block_types=up[::-1])  # the up blocks are listed from the middle on


def _vae_blocks(section: Config, patch: int) -> dict[str, Any]:
  levels, channels = len(section["widths"]), 3 * patch**2
  blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
  return dict(**blocks, in_channels=channels, out_channels=channels)


@contextlib.contextmanager
def of_shapes(where: str, hint: str = "copy it again") -> Iterator[None]:
  """Raise UserError if the functions below lack a tensor or find one of another shape."""
  try:
    yield
  except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"{where} is no whole checkpoint of such a network: {error!r}; {hint}") from error


def unet_of(tensors: Tensors) -> dict[str, Any]:
  """Return `model.unet`, from diffusers' names."""
  # Count the blocks of the first level: all levels have the same number, in Stable Diffusion and here.
  levels, depth = _count(tensors, "down_blocks.#."), _count(tensors, "down_blocks.0.resnets.#.")
  return dict(
    widths=tuple(tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)),
    attention=tuple(f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in range(levels)),
    **dict(depth=depth, num_heads=8, groups=32),
  )


def vae_of(tensors: Tensors) -> dict[str, Any]:
  """Return `model.autoencoder` without its scale, from diffusers' names."""
  levels = _count(tensors, "encoder.down_blocks.#.")
  return dict(
    widths=tuple(tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)),
    depth=_count(tensors, "encoder.down_blocks.0.resnets.#."),
    latent_channels=tensors["post_quant_conv.weight"].shape[0],
    attention="encoder.mid_block.attentions.0.to_q.weight" in tensors,
    **dict(groups=32, patch=1, shift=0.0),
  )


def text_of(tensors: Tensors) -> dict[str, Any]:
  """Return `model.text_encoder` without its activation and projection, from transformers' names."""
  # Read the width from the embeddings: the shapes in layers differ between towers.
  vocab_size, width = tensors["text_model.embeddings.token_embedding.weight"].shape
  length = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
  return dict(vocab_size=vocab_size, max_length=length, **_transformer(tensors, "text_model", width))


def vision_of(tensors: Tensors) -> dict[str, Any]:
  """Return `model.vision_encoder` without its activation, from transformers' names."""
  width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
  # There is a position for each patch of a square image, and one for the class token.
  positions = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
  section = _transformer(tensors, "vision_model", width)
  section |= dict(image_size=patch * round((positions - 1) ** 0.5), patch=patch)
  heads = min(section["num_heads"], MOST_VISION_HEADS)
  return section | dict(num_heads=heads, projection=tensors["visual_projection.weight"].shape[0])


def _transformer(tensors: Tensors, tower: str, width: int) -> dict[str, Any]:
  return dict(
    width=width,
    depth=_count(tensors, f"{tower}.encoder.layers.#."),
    num_heads=max(width // CLIP_HEAD_WIDTH, 1),
    mlp_width=tensors[f"{tower}.encoder.layers.0.mlp.fc1.weight"].shape[0],
  )


def _count(tensors: Tensors, pattern: str) -> int:
  """Count the indices that occur in the place of `#`."""
  regex = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
  return len({match[1] for match in map(regex.match, tensors) if match})
