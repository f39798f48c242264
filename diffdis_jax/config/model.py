"""A config's `model` section as frozen dataclasses. Defaults are those of Stable Diffusion v1 and of CLIP ViT-L/14."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.config.objectives import WITH_HEAD, Objectives
from diffdis_jax.errors import UserError, check_choice, check_number, check_numbers, read_section

# Names of what models/layers.py and models/attention.py have.
DTYPES = ("float32", "bfloat16")  # no float16, whose range asks for a scaled loss
ACTIVATIONS = ("quick_gelu", "gelu")
REMAT_POLICIES = ("none", "full", "dots", "dots_no_batch", "attention")
AUTO = "auto"
ATTENTION_KERNELS = (AUTO, "pallas", "cudnn", "xla_per_head", "xla")
MATMUL_PRECISIONS = (AUTO, "default", "high", "highest")
TOWER_GROUPS = 8  # of every GroupNorm of CLIP's convolutional tower
TEMPERATURE, MAX_TEMPERATURE = 1 / 0.07, 100.0  # CLIP's τ at the start, and its limit


def _check_counts(section: Any, *names: str) -> None:
  for name in names:
    check_number(name, getattr(section, name), at_least=1)


def _check_multiple(name: str, value: int, section: Any, *divisors: str) -> None:
  if any(value % getattr(section, divisor) for divisor in divisors):
    of = " and ".join(f"{divisor}={getattr(section, divisor)}" for divisor in divisors)
    raise UserError(f"{name} has {value}; it must be a multiple of {of}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetSize:
  """`model.unet`.

  Attributes:
    widths: channels of each level; each level but the last halves the resolution.
    attention: for each level, whether it has attention blocks; the middle always has one.
    depth: residual blocks of a level on the way down; one more on the way up.
    num_heads: attention heads at every level.
    groups: of every GroupNorm.
  """

  # At its lowest resolution, Stable Diffusion v1 attends in the middle block alone.
  widths: Sequence[int] = (320, 640, 1280, 1280)
  attention: Sequence[bool] = (True, True, True, False)
  depth: int = 2
  num_heads: int = 8
  groups: int = 32

  def __post_init__(self) -> None:
    _check_counts(self, "depth", "num_heads", "groups")
    check_numbers("widths", self.widths, at_least=1)
    if not self.widths or len(self.attention) != len(self.widths):
      raise UserError(
        f"attention has {len(self.attention)} entries and widths {len(self.widths)}; give one for each level"
      )
    # Heads part the channels of an attention, groups those of a GroupNorm.
    for width in self.widths:
      _check_multiple("widths", width, self, "num_heads", "groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentSize:
  """`model.alignment`, the alignment transformer.

  Attributes:
    width: of its tokens.
    depth: layers.
    num_heads: attention heads of a layer.
    spatial_pool: parts along each side of the middle feature map whose means are added to the text token's output, with
      a matrix of their own for each part; 0, the paper's, for none. They say where things are, which attention without
      positions reads badly.
  """

  # 6 blocks: appendix, with Table 4. Width 768 in heads of 64: main paper.
  width: int = 768
  depth: int = 6
  num_heads: int = 12
  spatial_pool: int = 0

  def __post_init__(self) -> None:
    _check_counts(self, "width", "depth", "num_heads")
    check_number("spatial_pool", self.spatial_pool, at_least=0)
    _check_multiple("width", self.width, self, "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderSize:
  """`model.text_encoder`.

  Attributes:
    vocab_size: of the tokenizer.
    max_length: tokens of the longest text.
    width: of a token.
    depth: layers.
    num_heads: attention heads of a layer.
    mlp_width: hidden width of a layer's MLP.
    activation: of the MLP, one of ACTIVATIONS.
    bos_id, eos_id: tokens that begin and end a text.
    projection: width of CLIP's text projection applied to the query; 0 for none.
    token_embedding_weight: weight of a second vector for each token, whose mean over the caption is added to the query;
      0 in CLIP and in the paper.
  """

  vocab_size: int = 49408
  max_length: int = 77
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_width: int = 3072
  activation: str = "quick_gelu"
  bos_id: int = 49406
  eos_id: int = 49407
  projection: int = 0
  token_embedding_weight: float = 0.0

  def __post_init__(self) -> None:
    _check_counts(self, "vocab_size", "width", "depth", "num_heads", "mlp_width")
    check_number("max_length", self.max_length, at_least=2)  # start and end, of an empty caption
    check_choice("activation", self.activation, ACTIVATIONS)
    # JAX does not fail at a place beyond a table: it takes the last row, or NaN.
    for name in ("bos_id", "eos_id"):
      check_number(name, getattr(self, name), at_least=0, at_most=self.vocab_size - 1)
    check_number("projection", self.projection, at_least=0)
    check_number("token_embedding_weight", self.token_embedding_weight, at_least=0.0)
    _check_multiple("width", self.width, self, "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderSize:
  """`model.autoencoder`.

  Attributes:
    widths: channels of each level, from the image down; each level but the last halves the resolution.
    depth: residual blocks of a level in the encoder; the decoder has one more.
    patch: side of the pixel patches that are folded into channels at first and unfolded at last; 1 in Stable Diffusion.
    latent_channels: of a latent.
    groups: of every GroupNorm.
    attention: whether the middle has a self-attention.
    shift, scale: z = (latent − shift) · scale, for all channels; where it is trained here, it measures its own.
  """

  widths: Sequence[int] = (128, 256, 512, 512)
  depth: int = 2
  patch: int = 1
  latent_channels: int = 4
  groups: int = 32
  attention: bool = True
  # Stable Diffusion v1's own factor. An autoencoder that is trained here measures its own (training/loss_function.py).
  shift: float = 0.0
  scale: float = 0.18215

  def __post_init__(self) -> None:
    _check_counts(self, "depth", "patch", "latent_channels", "groups")
    check_numbers("widths", self.widths, at_least=1)
    if not self.widths:
      raise UserError("widths is empty; give one for each level")
    for width in self.widths:
      _check_multiple("widths", width, self, "groups")
    check_number("shift", self.shift)
    check_number("scale", self.scale, above=0.0)

  @property
  def factor(self) -> int:
    """Pixels a side for one latent position."""
    # Every level but the last halves the side.
    return self.patch * 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSize:
  """`model.head`, of a long-tailed run's second stage alone.

  Attributes:
    classes: how many.
    anchors: sentences of each class.
  """

  classes: int
  anchors: int

  def __post_init__(self) -> None:
    check_number("classes", self.classes, at_least=2)
    check_number("anchors", self.anchors, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computing:
  """What both networks have.

  Attributes:
    temperature: τ of the contrastive loss at the start, 1 to 100; it is learned, or stays where `optim.groups` freezes
      logit_scale, its logarithm. Not stated by the paper.
    dtype: of matrix products and convolutions, float32 or bfloat16.
    matmul_precision: how they multiply f32, one of MATMUL_PRECISIONS. JAX's own default is the chip's fastest way, bf16
      on TPUs and TF32 on GPUs; on CPUs all are the same. `auto` is highest where dtype is float32, so that it means
      that, and default where it is bfloat16.
    attention_kernel: one of ATTENTION_KERNELS wherever it can run; `auto` is the fastest on the device.
    remat: what the backward pass keeps of each block or layer, one of REMAT_POLICIES.
    head: of a long-tailed run's second stage alone.

  Raises:
    UserError: a value out of its range.
  """

  temperature: float = TEMPERATURE
  dtype: str = "bfloat16"
  remat: str = "none"
  matmul_precision: str = AUTO
  attention_kernel: str = AUTO
  head: HeadSize | None = None

  def __post_init__(self) -> None:
    # From 1: CLIP's training keeps ln τ at 0 or above (optim.limit_logit_scale).
    check_number("temperature", self.temperature, at_least=1.0, at_most=MAX_TEMPERATURE)
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
    check_choice("attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
    check_choice("remat", self.remat, REMAT_POLICIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Computing):
  """A config's `model` section.

  Attributes:
    fusion: whether the fusion blocks are there (appendix, Table 4).
    share_attention: whether text and image tokens share a fusion block's attention (Table 5).
    modality_ffn: whether the text token has a feed-forward network of its own (Table 5).
    query_init: scale of FC_in's initial kernel; not stated by the paper.
    unet, alignment, text_encoder, autoencoder: sizes of the parts.
  """

  fusion: bool = True
  share_attention: bool = True
  modality_ffn: bool = True
  query_init: float = 1.0
  unet: UNetSize = UNetSize()
  alignment: AlignmentSize = AlignmentSize()
  text_encoder: TextEncoderSize = TextEncoderSize()
  autoencoder: AutoencoderSize = AutoencoderSize()

  def __post_init__(self) -> None:
    super().__post_init__()  # which no dataclass calls by itself
    check_number("query_init", self.query_init, at_least=0.0)

  @property
  def query_width(self) -> int:
    """Of the text query e."""
    return self.text_encoder.projection or self.text_encoder.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionEncoderSize:
  """`model.vision_encoder`, for CLIP.

  Attributes:
    image_size: side of the square images that the learned positions are of, pixels.
    patch: side of a patch, pixels; each is one token.
    width: of a token.
    depth: layers.
    num_heads: attention heads of a layer.
    mlp_width: hidden width of a layer's MLP.
    activation: of the MLP, one of ACTIVATIONS.
    projection: width of the image's embedding.
    spatial_pool: parts along each side of the map of tokens whose means are added to the embedding, with a matrix of
      their own for each part, as AlignmentSize.spatial_pool; 0 in CLIP.
    convolutional: a tower of the UNet's residual blocks instead of a transformer, to compare encoders; not CLIP's. It
      has `depth` blocks a level after the patches; width, num_heads, mlp_width and activation are the transformer's.
    widths: of a convolutional tower alone, channels of each level, multiples of 8; each level but the last halves the
      resolution.
  """

  image_size: int = 224
  patch: int = 14
  width: int = 1024
  depth: int = 24
  num_heads: int = 16
  mlp_width: int = 4096
  activation: str = "quick_gelu"
  projection: int = 768
  spatial_pool: int = 0
  convolutional: bool = False
  widths: Sequence[int] = (64, 128, 256)

  def __post_init__(self) -> None:
    _check_counts(self, "image_size", "patch", "width", "depth", "num_heads", "mlp_width", "projection")
    check_choice("activation", self.activation, ACTIVATIONS)
    check_number("spatial_pool", self.spatial_pool, at_least=0)
    check_choice("convolutional", self.convolutional, (True, False))
    check_numbers("widths", self.widths, at_least=1)
    if not self.widths or any(width % TOWER_GROUPS for width in self.widths):
      raise UserError(f"widths is {self.widths}; give a multiple of {TOWER_GROUPS} for each level")
    _check_multiple("image_size", self.image_size, self, "patch")
    _check_multiple("width", self.width, self, "num_heads")

  @property
  def stride(self) -> int:
    """Pixels a side for one position of the tower's last map."""
    return self.patch * 2 ** (len(self.widths) - 1) if self.convolutional else self.patch

  @property
  def last_width(self) -> int:
    """Of that map."""
    return self.widths[-1] if self.convolutional else self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipModel(Computing):
  """The `model` section for CLIP, whose objective is `contrastive`.

  Attributes:
    text_encoder, vision_encoder: sizes of the towers.

  Raises:
    UserError: besides, towers that do not end in one width.
  """

  # A projection, unlike the text encoder of Stable Diffusion, since the towers must end in one width.
  text_encoder: TextEncoderSize = TextEncoderSize(projection=768)
  vision_encoder: VisionEncoderSize = VisionEncoderSize()

  def __post_init__(self) -> None:
    super().__post_init__()
    text, vision = self.text_encoder.projection, self.vision_encoder.projection
    if text != vision:
      raise UserError(
        f"text_encoder.projection is {text} and vision_encoder.projection {vision}; CLIP compares what the towers end"
        " in, so both must be one width"
      )

  @property
  def query_width(self) -> int:
    """Of the text query e and of an image's embedding."""
    return self.text_encoder.projection


_PARTS = {
  "unet": UNetSize,
  "alignment": AlignmentSize,
  "text_encoder": TextEncoderSize,
  "autoencoder": AutoencoderSize,
  "vision_encoder": VisionEncoderSize,
  "head": HeadSize,
}


def read_model(fields: Mapping[str, Any], objectives: Objectives) -> Model | ClipModel:
  """The `model` section of a config with these objectives.

  Raises:
    UserError: a field that is unknown or missing, or out of its range; or another network than the objectives train.
  """
  # The network before its fields: of the wrong one, every field would be unknown or missing.
  has_vision = "vision_encoder" in fields
  if objectives.is_clip and not has_vision:
    raise UserError(
      f"model has no vision_encoder, which objective {objectives[0]} trains; take a config of CLIP, such as"
      " configs/clip_cc3m.py"
    )
  if has_vision and objectives.first.network not in ("clip", "either"):
    raise UserError("model has a vision_encoder, which is CLIP's; its one objective is objectives=('contrastive',)")
  aligned = "head" in fields
  if aligned != objectives.first.head:
    raise UserError(
      f"objectives is {', '.join(objectives)}, and model.head is {'there' if aligned else 'missing'}; a head belongs"
      f" to {', '.join(WITH_HEAD)} alone: take configs/places_lt.py:stage=2"
    )
  parts = {name: read_section(kind, fields[name], f"model.{name}") for name, kind in _PARTS.items() if name in fields}
  return read_section(ClipModel if has_vision else Model, {**fields, **parts}, "model")
