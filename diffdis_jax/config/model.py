"""Define a config's `model` section, with defaults of Stable Diffusion v1 and CLIP ViT-L/14."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.config.section import Section, check_number, choice, field, number
from diffdis_jax.errors import UserError

# Names of dtypes, activations and kernels in models/layers.py and models/attention.py.
DTYPES = ("float32", "bfloat16")  # no float16, whose range needs a scaled loss
ACTIVATIONS = ("quick_gelu", "gelu")
REMAT_POLICIES = ("none", "full", "dots", "dots_no_batch", "attention")
AUTO = "auto"
ATTENTION_KERNELS = (AUTO, "pallas", "cudnn", "xla_per_head", "xla")
MATMUL_PRECISIONS = (AUTO, "default", "high", "highest")
# CLIP's image towers, and the patches a side for a position of their last map; an extension may add others.
TOWERS = {"transformer": 1}
TEXT_STREAMS = ["paper"]  # kinds of DiffDis' text stream; an extension may add others
TEMPERATURE, MAX_TEMPERATURE = 1 / 0.07, 100.0  # CLIP's initial τ, and its limit
HEADS = "attention heads of a layer"
MLP = "hidden width of a layer's MLP"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetSize(Section):
  """The section `model.unet`."""

  widths: Sequence[int] = number(
    (320, 640, 1280, 1280),
    ge=1,
    multiple_of=("num_heads", "groups"),  # num_heads divides the channels of attention, groups those of GroupNorm
    help="channels of each level; each level but the last halves the resolution",
  )
  # At its lowest resolution, Stable Diffusion v1 attends in the middle block alone.
  attention: Sequence[bool] = field(
    (True, True, True, False), help="for each level, it has attention blocks; the middle always has one"
  )
  depth: int = number(2, ge=1, help="residual blocks of a level on the way down; one more on the way up")
  num_heads: int = number(8, ge=1, help="attention heads at every level")
  groups: int = number(32, ge=1, help="groups of every GroupNorm")

  def __post_init__(self) -> None:
    super().__post_init__()
    if len(self.attention) != len(self.widths):
      raise UserError(
        f"attention has {len(self.attention)} entries and widths {len(self.widths)}; give one for each level"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentSize(Section):
  """The section `model.alignment`, the alignment transformer."""

  # 6 blocks: appendix, with Table 4. Width 768 in heads of 64: main paper.
  width: int = number(768, ge=1, multiple_of=("num_heads",), help="width of a token")
  depth: int = number(6, ge=1, help="layers")
  num_heads: int = number(12, ge=1, help=HEADS)
  # Each part has its own matrix. Parts show where objects are, which attention without positions can hardly read.
  spatial_pool: int = number(
    0, ge=0, help="parts along each side of the middle feature map, added to the text token's output; 0, the paper's"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderSize(Section):
  """The section `model.text_encoder`."""

  vocab_size: int = number(49408, ge=1, help="tokens of the tokenizer")
  max_length: int = number(
    77, ge=2, help="tokens of the longest text"
  )  # the empty caption has a start and an end token
  width: int = number(768, ge=1, multiple_of=("num_heads",), help="width of a token")
  depth: int = number(12, ge=1, help="layers")
  num_heads: int = number(12, ge=1, help=HEADS)
  mlp_width: int = number(3072, ge=1, help=MLP)
  activation: str = choice("quick_gelu", ACTIVATIONS, help="activation of the MLP")
  bos_id: int = number(49406, ge=0, help="token that begins a text")
  eos_id: int = number(49407, ge=0, help="token that ends a text")
  projection: int = number(0, ge=0, help="width of CLIP's text projection applied to the query; 0 for none")
  token_embedding_weight: float = number(
    0.0, ge=0, help="weight of the mean of a second vector for each token, added to the query; 0 in CLIP and the paper"
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    # JAX does not fail at an index beyond a table: it takes the last row, or NaN.
    for name in ("bos_id", "eos_id"):
      check_number(name, getattr(self, name), le=self.vocab_size - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderSize(Section):
  """The section `model.autoencoder`."""

  widths: Sequence[int] = number(
    (128, 256, 512, 512),
    ge=1,
    multiple_of=("groups",),
    help="channels of each level, from the image down; each but the last halves the side",
  )
  depth: int = number(2, ge=1, help="residual blocks of a level in the encoder; the decoder has one more")
  patch: int = number(1, ge=1, help="side of the pixel patches that are folded into channels; 1 in Stable Diffusion")
  latent_channels: int = number(4, ge=1, help="channels of a latent")
  groups: int = number(32, ge=1, help="groups of every GroupNorm")
  attention: bool = field(True, help="the middle has a self-attention")
  # Stable Diffusion v1's own factor. An autoencoder trained here measures its own (training/losses.py).
  shift: float = number(0.0, help="z = (latent − shift) · scale, for all channels")
  scale: float = number(0.18215, gt=0, help="z = (latent − shift) · scale, for all channels")

  @property
  def factor(self) -> int:
    """Return the pixels a side for one latent position."""
    # Every level but the last halves the side.
    return self.patch * 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSize(Section):
  """The section `model.head`, only for the second stage of a long-tailed run."""

  classes: int = number(ge=2, help="number of classes")
  anchors: int = number(ge=1, help="sentences of each class")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStreamKind(Section):
  """The section `model.text_stream`, only for a run with an extension's text stream."""

  kind: str = choice("paper", TEXT_STREAMS, help="kind of text stream")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computing(Section):
  """The fields that both networks have."""

  # At least 1, since CLIP's training keeps ln τ at 0 or above (optim.limit_logit_scale). It is learned, unless
  # `optim.groups` freezes its logarithm logit_scale. Not stated by the paper.
  temperature: float = number(
    TEMPERATURE, ge=1, le=MAX_TEMPERATURE, help="τ of the contrastive loss at the start, 1 to 100"
  )
  dtype: str = choice("bfloat16", DTYPES, help="dtype of matrix products and convolutions")
  remat: str = choice("none", REMAT_POLICIES, help="what the backward pass keeps of each block or layer")
  # JAX's own default is the chip's fastest way, bf16 on TPUs and TF32 on GPUs; on CPUs all are the same. `auto` is
  # `highest` for dtype float32 and `default` for bfloat16.
  matmul_precision: str = choice(AUTO, MATMUL_PRECISIONS, help="how matrix products multiply f32")
  attention_kernel: str = choice(
    AUTO, ATTENTION_KERNELS, help="kernel of attention, wherever it can run; auto is the fastest on the device"
  )
  head: HeadSize | None = field(None, kind=HeadSize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Computing):
  """The `model` section of a config."""

  fusion: bool = field(True, help="the fusion blocks are there (appendix, Table 4)")
  share_attention: bool = field(True, help="text and image tokens share a fusion block's attention (Table 5)")
  modality_ffn: bool = field(True, help="the text token has a feed-forward network of its own (Table 5)")
  query_init: float = number(1.0, ge=0, help="scale of FC_in's initial kernel; not stated by the paper")
  text_stream: TextStreamKind | None = field(None, kind=TextStreamKind)
  unet: UNetSize = field(UNetSize())
  alignment: AlignmentSize = field(AlignmentSize())
  text_encoder: TextEncoderSize = field(TextEncoderSize())
  autoencoder: AutoencoderSize = field(AutoencoderSize())

  @property
  def query_width(self) -> int:
    """Return the width of the text query e."""
    return self.text_encoder.projection or self.text_encoder.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionEncoderSize(Section):
  """The section `model.vision_encoder`, for CLIP."""

  image_size: int = number(
    224, ge=1, multiple_of=("patch",), help="side of the square images that the learned positions are of, pixels"
  )
  patch: int = number(14, ge=1, help="side of a patch, pixels; each is one token")
  width: int = number(1024, ge=1, multiple_of=("num_heads",), help="width of a token")
  depth: int = number(24, ge=1, help="layers")
  num_heads: int = number(16, ge=1, help=HEADS)
  mlp_width: int = number(4096, ge=1, help=MLP)
  activation: str = choice("quick_gelu", ACTIVATIONS, help="activation of the MLP")
  projection: int = number(768, ge=1, help="width of the image's embedding")
  # The same as AlignmentSize.spatial_pool.
  spatial_pool: int = number(
    0, ge=0, help="parts along each side of the map of tokens whose means are added to the embedding; 0 in CLIP"
  )
  tower: str = choice("transformer", TOWERS, help="kind of image encoder")

  @property
  def stride(self) -> int:
    """Return the pixels a side for one position of the tower's last map."""
    return self.patch * TOWERS[self.tower]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipModel(Computing):
  """The `model` section for CLIP, whose objective is `contrastive`.

  Raises:
    UserError: a value is out of its range, or the towers do not end in one width.
  """

  # Unlike Stable Diffusion's text encoder it has a projection, since the two towers must end in the same width.
  text_encoder: TextEncoderSize = field(TextEncoderSize(projection=768))
  vision_encoder: VisionEncoderSize = field(VisionEncoderSize())

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
    """Return the width of the text query e and of an image's embedding."""
    return self.text_encoder.projection


def network_of(values: Any) -> type[Model] | type[ClipModel]:
  """Return the class of a `model` section with these values."""
  return ClipModel if isinstance(values, Mapping) and "vision_encoder" in values else Model
