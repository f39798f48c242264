"""A config to its network: the module with only the parts that its objectives need, and a record of what is fixed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax.common.params import Params, flatten, merge
from diffdis_jax.errors import UserError, check_choice, check_number, read_section
from diffdis_jax.method.alignment import AlignmentTransformer
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.fusion import TextStream
from diffdis_jax.method.schedules import Process
from diffdis_jax.models import attention, clip_init
from diffdis_jax.models.attention import AUTO
from diffdis_jax.models.autoencoder import Autoencoder
from diffdis_jax.models.clip import Clip, VisionEncoder
from diffdis_jax.models.layers import DTYPES
from diffdis_jax.models.lgr import LanguageGuidedHead
from diffdis_jax.models.sections import CLIP_PARTS, PARTS, ClipModel, Model, read_clip, read_model
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.models.unet import UNet
from diffdis_jax.parallel import sharding

# Stages 1 and 2 of VL-LTR's long-tailed recognition (paper appendix, Table 8), on either network.
LONG_TAIL = ("class_contrastive", "long_tail_head")
OBJECTIVES = ("generation", "discrimination", "reconstruction", "contrastive", *LONG_TAIL)
# Objectives that no other can stand beside, and what they train.
ALONE = {
  "reconstruction": "the autoencoder",
  "contrastive": "CLIP's two towers",
  "class_contrastive": "an image and a text side",
  "long_tail_head": "the language-guided head",
}
MOST_PIXELS = 8192  # a side of an image, of which one row of a batch then has 0.2 GB
HEAD_PREFIX = "head."  # of its parameters' paths
# Objectives whose networks compare images with texts.
ALIGNED = ("discrimination", "contrastive", *LONG_TAIL)


def check_objectives(objectives: Sequence[str]) -> None:
  """Raises UserError for objectives that are unknown or do not go together."""
  if not objectives:
    raise UserError(f"objectives is empty; choose among {', '.join(OBJECTIVES)}")
  for objective in objectives:
    check_choice("objectives", objective, OBJECTIVES)
  for objective, trained in ALONE.items():
    if objective in objectives and len(objectives) > 1:
      raise UserError(f"objectives: {objective} trains {trained} alone and cannot be combined with others")


def check_sizes(model: Model | ClipModel, *, objectives: Sequence[str], image_size: int, max_length: int) -> None:
  """Raises UserError for images and texts that the network cannot take."""
  check_number("image_size", image_size, at_least=1, at_most=MOST_PIXELS)
  if isinstance(model, ClipModel):
    stride = model.vision_encoder.patch
    why = f"patches of {stride} px do not tile it"
  else:
    factor = model.autoencoder.factor
    stride = factor if "reconstruction" in objectives else factor * 2 ** (len(model.unet.widths) - 1)
    why = f"autoencoder and UNet together halve it down by {stride}"
  # Every level must halve evenly: the up path joins maps of equal sizes.
  if image_size % stride:
    near = max(1, round(image_size / stride)) * stride
    raise UserError(f"image_size is {image_size}; {why}, so it must be a multiple of {stride}, such as {near}")
  if isinstance(model, Model) and (parts := model.alignment.spatial_pool) and {*ALIGNED} & {*objectives}:
    side = image_size // stride
    if side % parts:
      raise UserError(
        f"model.alignment.spatial_pool is {parts}; the middle feature map is {side} x {side}, so it must divide {side}"
      )
  if not 2 <= max_length <= model.text_encoder.max_length:
    raise UserError(
      f"data.max_length is {max_length}; it must be from 2 to model.text_encoder.max_length,"
      f" {model.text_encoder.max_length}"
    )


def build_diffdis(model: Model, objectives: Sequence[str], rngs: nnx.Rngs) -> DiffDis:
  """The module.

  Generation alone has no text stream and no alignment transformer: it is the Stable Diffusion baseline. Reconstruction
  is the autoencoder alone.
  """
  common: dict[str, Any] = dict(dtype=DTYPES[model.dtype], rngs=rngs)
  sizes = {name: dataclasses.asdict(getattr(model, name)) for name in PARTS}
  autoencoder = Autoencoder(**sizes["autoencoder"], **common)
  # First of all, since nothing else is built for it: an autoencoder alone has no text and no UNet.
  if "reconstruction" in objectives:
    return DiffDis(autoencoder=autoencoder, text_encoder=None, unet=None, text_stream=None, alignment=None)
  aligned = bool({*ALIGNED} & {*objectives})
  # Token embeddings are a part of e alone, which generation never reads.
  text_sizes = sizes["text_encoder"] | ({} if aligned else {"token_embedding_weight": 0.0})
  text_encoder = TextEncoder(**text_sizes, **common)
  unet = UNet(
    **sizes["unet"],
    context_width=model.text_encoder.width,
    latent_channels=model.autoencoder.latent_channels,
    remat=model.remat,
    up_path="generation" in objectives,
    **common,
  )
  text_stream = alignment = None
  if aligned:
    # One fusion block for each attention block of the UNet's first half; none where fusion is off (Table 4).
    text_stream = TextStream(
      unet.fused_widths if model.fusion else (),
      query_width=model.query_width,
      num_heads=model.unet.num_heads,
      share_attention=model.share_attention,
      modality_ffn=model.modality_ffn,
      query_init=model.query_init,
      **common,
    )
    alignment = AlignmentTransformer(
      query_width=model.query_width, image_width=model.unet.widths[-1], **sizes["alignment"], **common
    )
  return DiffDis(
    autoencoder=autoencoder,
    text_encoder=text_encoder,
    unet=unet,
    text_stream=text_stream,
    alignment=alignment,
    head=build_head(model, rngs),
    temperature=model.temperature,
  )


def build_head(model: Model | ClipModel, rngs: nnx.Rngs) -> LanguageGuidedHead | None:
  """Where the model has one."""
  if model.head is None:
    return None
  return LanguageGuidedHead(width=model.query_width, **dataclasses.asdict(model.head), rngs=rngs)


def build_clip(model: ClipModel, rngs: nnx.Rngs) -> Clip:
  """CLIP's two towers."""
  common: dict[str, Any] = dict(dtype=DTYPES[model.dtype], remat=model.remat, rngs=rngs)
  text, vision = (dataclasses.asdict(getattr(model, name)) for name in CLIP_PARTS)
  return Clip(
    text_encoder=TextEncoder(**text, **common),
    vision_encoder=VisionEncoder(**vision, **common),
    head=build_head(model, rngs),
    temperature=model.temperature,
  )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Network:
  """Everything about a config's network that training and inference share and that never changes. Built once.

  Attributes:
    model: sizes and switches.
    objectives: what it is trained for. `contrastive` makes it a CLIP; those of long-tailed recognition take either
      network, and all others a DiffDis.
    image_size: side of the square images, pixels.
    max_length: tokens of a caption.
    image_process, text_process: the two diffusion processes. CLIP has no use for them.
    condition_timestep: t_z of the clean image in discrimination (appendix, Table 7), 0 to 1000.
    graphdef, abstract: of the module, as `params.merge` takes them.
  """

  model: Model | ClipModel
  objectives: tuple[str, ...]
  image_size: int
  max_length: int
  image_process: Process
  text_process: Process
  condition_timestep: int
  graphdef: nnx.GraphDef
  abstract: nnx.State

  @classmethod
  def of(cls, config: ConfigDict) -> Network:
    """The network of a config, from shapes alone: nothing is allocated.

    Raises:
      UserError: a field out of its range, or a network that cannot be built.
    """
    objectives = tuple(config.objectives)
    check_objectives(objectives)
    model = _read_sections(config.model, objectives)
    check_sizes(model, objectives=objectives, image_size=config.image_size, max_length=config.data.max_length)
    check_number("condition_timestep", config.condition_timestep, at_least=0, at_most=1000)
    image, text = (
      read_section(Process, config[name].to_dict(), name) for name in ("image_diffusion", "text_diffusion")
    )
    graphdef, abstract = abstract_module(_builder(model, objectives))
    return cls(
      model=model,
      objectives=objectives,
      image_size=config.image_size,
      max_length=config.data.max_length,
      image_process=image,
      text_process=text,
      condition_timestep=config.condition_timestep,
      graphdef=graphdef,
      abstract=abstract,
    )

  @functools.cached_property
  def shapes(self) -> Params:
    """Parameter path -> ShapeDtypeStruct."""
    return flatten(self.abstract)

  @property
  def is_clip(self) -> bool:
    """Rather than a DiffDis."""
    return isinstance(self.model, ClipModel)

  @property
  def dtype(self) -> Any:
    """Of matrix products and convolutions."""
    return DTYPES[self.model.dtype]

  @property
  def matmul_precision(self) -> str:
    """How every program of the network multiplies f32: default, high or highest."""
    if self.model.matmul_precision != AUTO:
      return self.model.matmul_precision
    return "highest" if self.model.dtype == "float32" else "default"

  def traced_for(self, mesh: Mesh, f: Callable[..., Any]) -> Callable[..., Any]:
    """f, one of the network's programs, to be jitted: traced for the devices of `mesh`, with the network's precision
    and form of attention."""
    f = attention.by(self.model.attention_kernel)(f)
    return sharding.traced_for(mesh, f, matmul_precision=self.matmul_precision)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """[h, w, c] of one image's latent. Raises UserError for a CLIP, which has none."""
    if isinstance(self.model, ClipModel):
      raise UserError("this run is a CLIP, which has no autoencoder and so no latents; take a run of DiffDis")
    side = self.image_size // self.model.autoencoder.factor
    return side, side, self.model.autoencoder.latent_channels

  def with_params(self, params: Params) -> DiffDis | Clip:
    """The module with these parameters."""
    return merge(self.graphdef, self.abstract, params)

  def initialise(self, key: jax.Array) -> Params:
    """Fresh parameters; run under jit with out_shardings, so that they are born sharded."""
    if not isinstance(self.model, ClipModel):
      return flatten(initial_state(_builder(self.model, self.objectives), key))
    of_head = {path for path in self.shapes if path.startswith(HEAD_PREFIX)}
    params = clip_init.initialise(
      key, {path: leaf for path, leaf in self.shapes.items() if path not in of_head}, self.model
    )
    if of_head:
      built = flatten(initial_state(_builder(self.model, self.objectives), key))
      params |= {path: built[path] for path in of_head}
    return params


def _read_sections(section: ConfigDict, objectives: Sequence[str]) -> Model | ClipModel:
  """Raises UserError: as `read_model`, or a head without its objective, or the objective without a head."""
  of_clip = "contrastive" in objectives or ({*LONG_TAIL} & {*objectives} and "vision_encoder" in section)
  model = read_clip(section) if of_clip else read_model(section)
  if (model.head is not None) != ("long_tail_head" in objectives):
    raise UserError(
      f"objectives is {', '.join(objectives)}, and model.head is {'missing' if model.head is None else 'there'}; a head"
      " belongs to long_tail_head alone: take configs/places_lt.py:stage=2"
    )
  return model


def _builder(model: Model | ClipModel, objectives: Sequence[str]) -> Callable[[nnx.Rngs], DiffDis | Clip]:
  """A function from rngs to the module with fresh parameters."""
  if isinstance(model, ClipModel):
    return functools.partial(build_clip, model)
  return functools.partial(build_diffdis, model, objectives)


class _Rngs(nnx.Rngs):
  """nnx.Rngs that makes its keys in blocks and counts them in Python; the keys are the same.

  nnx's own counter asks a traced value for its sharding, and the error that answers walks the whole trace. Time then
  grows with the square of the number of parameters: half a minute instead of two seconds for Stable Diffusion v1. And
  a key folded in for each parameter by itself nearly doubles the time that the program takes to compile.
  """

  _BLOCK = 1024

  def __init__(self, key: jax.Array):
    super().__init__(key)
    self._count = itertools.count()
    self._keys = functools.cache(self._make_block)

  def params(self) -> jax.Array:
    block, index = divmod(next(self._count), self._BLOCK)
    return self._keys(block)[index]

  def _make_block(self, block: int) -> jax.Array:
    first = block * self._BLOCK
    keys = jax.vmap(jax.random.fold_in, (None, 0))(self.default.key[...], jnp.arange(first, first + self._BLOCK))
    # Else the compiler would fold in every key again wherever it is used.
    return jax.lax.optimization_barrier(keys)


def abstract_module(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
  """Graph definition and shapes, with nothing allocated."""
  return nnx.split(nnx.eval_shape(lambda: build(_Rngs(jax.random.key(0)))))


def initial_state(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.State:
  """Initial state of the module that `build` gives."""
  return nnx.state(build(_Rngs(key)))
