"""A config's `model` section as frozen dataclasses, each of which knows the range of its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffdis_jax.errors import UserError, check_choice, check_number, check_numbers, read_section
from diffdis_jax.models.attention import AUTO, KERNELS
from diffdis_jax.models.layers import ACTIVATIONS, DTYPES
from diffdis_jax.models.remat import REMAT_POLICIES
from diffdis_jax.models.sizes import TEMPERATURE

MATMUL_PRECISIONS = (AUTO, "default", "high", "highest")
MAX_TEMPERATURE = 100.0  # CLIP's


def _check_counts(section: Any, *names: str) -> None:
  for name in names:
    check_number(name, getattr(section, name), at_least=1)


def _check_temperature(section: Any) -> None:
  check_number("temperature", section.temperature, at_least=1.0, at_most=MAX_TEMPERATURE)


def _check_multiple(name: str, value: int, section: Any, *divisors: str) -> None:
  if any(value % getattr(section, divisor) for divisor in divisors):
    of = " and ".join(f"{divisor}={getattr(section, divisor)}" for divisor in divisors)
    raise UserError(f"{name} has {value}; it must be a multiple of {of}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetSize:
  """`model.unet`; unet.UNet says what the fields are."""

  widths: Sequence[int]
  attention: Sequence[bool]
  depth: int
  num_heads: int
  groups: int

  def __post_init__(self) -> None:
    _check_counts(self, "depth", "num_heads", "groups")
    check_numbers("widths", self.widths, at_least=1)
    if not self.widths or len(self.attention) != len(self.widths):
      raise UserError(
        f"attention has {len(self.attention)} entries and widths {len(self.widths)}; give one for each level"
      )
    for width in self.widths:
      _check_multiple("widths", width, self, "num_heads", "groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentSize:
  """`model.alignment`; alignment.AlignmentTransformer says what the fields are."""

  width: int
  depth: int
  num_heads: int
  spatial_pool: int = 0

  def __post_init__(self) -> None:
    _check_counts(self, "width", "depth", "num_heads")
    check_number("spatial_pool", self.spatial_pool, at_least=0)
    _check_multiple("width", self.width, self, "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderSize:
  """`model.text_encoder`; text_encoder.TextEncoder says what the fields are."""

  vocab_size: int
  max_length: int
  width: int
  depth: int
  num_heads: int
  mlp_width: int
  activation: str
  bos_id: int
  eos_id: int
  projection: int
  token_embedding_weight: float = 0.0

  def __post_init__(self) -> None:
    _check_counts(self, "vocab_size", "width", "depth", "num_heads", "mlp_width")
    check_number("max_length", self.max_length, at_least=2)
    check_choice("activation", self.activation, ACTIVATIONS)
    for name in ("bos_id", "eos_id"):
      check_number(name, getattr(self, name), at_least=0, at_most=self.vocab_size - 1)
    check_number("projection", self.projection, at_least=0)
    check_number("token_embedding_weight", self.token_embedding_weight, at_least=0.0)
    _check_multiple("width", self.width, self, "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderSize:
  """`model.autoencoder`; autoencoder.Autoencoder says what the fields are."""

  widths: Sequence[int]
  depth: int
  patch: int
  latent_channels: int
  groups: int
  attention: bool
  shift: float
  scale: float

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
    return self.patch * 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSize:
  """`model.head`, of a long-tailed run's second stage alone; lgr.LanguageGuidedHead says what the fields are."""

  classes: int
  anchors: int

  def __post_init__(self) -> None:
    check_number("classes", self.classes, at_least=2)
    check_number("anchors", self.anchors, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A config's `model` section.

  Attributes:
    fusion, share_attention, modality_ffn: the fusion block's switches (appendix, Tables 4 and 5).
    query_init: scale of FC_in's initial kernel; not stated by the paper.
    temperature: τ of the contrastive loss at the start, 1 to 100; it is learned, or stays where `optim.groups` freezes
      logit_scale, its logarithm. Not stated by the paper.
    dtype: of matrix products and convolutions, float32 or bfloat16.
    matmul_precision: how they multiply f32, one of MATMUL_PRECISIONS. JAX's own default is the chip's fastest way, bf16
      on TPUs and TF32 on GPUs; on CPUs all are the same. `auto` is highest where dtype is float32, so that it means
      that, and default where it is bfloat16.
    attention_kernel: one of attention.KERNELS wherever it can run; `auto` is the fastest on the device.
    remat: what the backward pass keeps, one of remat.REMAT_POLICIES.

  Raises:
    UserError: a value out of its range.
  """

  fusion: bool
  share_attention: bool
  modality_ffn: bool
  query_init: float
  temperature: float = TEMPERATURE
  dtype: str
  remat: str
  matmul_precision: str = AUTO
  attention_kernel: str = AUTO
  unet: UNetSize
  alignment: AlignmentSize
  text_encoder: TextEncoderSize
  autoencoder: AutoencoderSize
  head: HeadSize | None = None

  def __post_init__(self) -> None:
    check_number("query_init", self.query_init, at_least=0.0)
    _check_temperature(self)
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
    check_choice("attention_kernel", self.attention_kernel, (AUTO, *KERNELS))
    check_choice("remat", self.remat, REMAT_POLICIES)

  @property
  def query_width(self) -> int:
    """Of the text query e."""
    return self.text_encoder.projection or self.text_encoder.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionEncoderSize:
  """`model.vision_encoder` of a CLIP; clip.VisionEncoder says what the fields are."""

  image_size: int
  patch: int
  width: int
  depth: int
  num_heads: int
  mlp_width: int
  activation: str
  projection: int

  def __post_init__(self) -> None:
    _check_counts(self, "image_size", "patch", "width", "depth", "num_heads", "mlp_width", "projection")
    check_choice("activation", self.activation, ACTIVATIONS)
    _check_multiple("image_size", self.image_size, self, "patch")
    _check_multiple("width", self.width, self, "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipModel:
  """The `model` section of a CLIP, whose objective is `contrastive`.

  Attributes:
    temperature, dtype, matmul_precision, attention_kernel: as Model's.
    remat: what the backward pass keeps of each layer, one of remat.REMAT_POLICIES.

  Raises:
    UserError: a value out of its range, or towers that do not end in one width.
  """

  temperature: float = TEMPERATURE
  dtype: str
  remat: str = "none"
  matmul_precision: str = AUTO
  attention_kernel: str = AUTO
  text_encoder: TextEncoderSize
  vision_encoder: VisionEncoderSize
  head: HeadSize | None = None

  def __post_init__(self) -> None:
    _check_temperature(self)
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
    check_choice("attention_kernel", self.attention_kernel, (AUTO, *KERNELS))
    check_choice("remat", self.remat, REMAT_POLICIES)
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


PARTS = {"unet": UNetSize, "alignment": AlignmentSize, "text_encoder": TextEncoderSize, "autoencoder": AutoencoderSize}
CLIP_PARTS = {"text_encoder": TextEncoderSize, "vision_encoder": VisionEncoderSize}
HEAD = {"head": HeadSize}


def read_model(section: ConfigDict) -> Model:
  """The `model` section of a DiffDis config.

  Raises:
    UserError: a field that is unknown or missing, or out of its range.
  """
  if "vision_encoder" in section:
    raise UserError("model has a vision_encoder, which is CLIP's; its one objective is objectives=('contrastive',)")
  return read_section(Model, _with_parts(section, PARTS | HEAD), "model")


def read_clip(section: ConfigDict) -> ClipModel:
  """The `model` section of a CLIP config. Raises as `read_model`."""
  if "vision_encoder" not in section:
    raise UserError(
      "model has no vision_encoder, which objective contrastive trains; take a config of CLIP, such as"
      " configs/clip_cc3m.py"
    )
  return read_section(ClipModel, _with_parts(section, CLIP_PARTS | HEAD), "model")


def _with_parts(section: ConfigDict, kinds: Mapping[str, type[Any]]) -> dict[str, Any]:
  fields = section.to_dict()
  given = {name: kind for name, kind in kinds.items() if name in fields}
  return fields | {name: read_section(kind, fields[name], f"model.{name}") for name, kind in given.items()}
