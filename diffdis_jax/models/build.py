"""A config's `model` section to a module, with only the parts that its objectives need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffdis_jax.models.alignment import AlignmentTransformer
from diffdis_jax.models.autoencoder import Autoencoder
from diffdis_jax.models.diffdis import DiffDis
from diffdis_jax.models.fusion import TextStream
from diffdis_jax.models.layers import ACTIVATIONS
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.models.unet import REMAT_POLICIES, UNet
from diffdis_jax.structs import UserError

OBJECTIVES = ("generation", "discrimination", "reconstruction")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _choice(name: str, value: str, choices: Collection[str]) -> None:
  if value not in choices:
    raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def check(model: Mapping[str, Any], *, objectives: Collection[str], image_size: int, max_length: int) -> None:
  """Raises UserError for a model that cannot be built, or cannot take images and texts of these sizes."""
  if not objectives:
    raise UserError(f"objectives is empty; choose among {', '.join(OBJECTIVES)}")
  for objective in objectives:
    _choice("objectives", objective, OBJECTIVES)
  if "reconstruction" in objectives and len(objectives) > 1:
    raise UserError("objectives: reconstruction trains the autoencoder alone and cannot be combined with others")
  _choice("model.dtype", model["dtype"], DTYPES)
  _choice("model.remat", model["remat"], REMAT_POLICIES)
  _choice("model.text_encoder.activation", model["text_encoder"]["activation"], ACTIVATIONS)
  factor = latent_factor(model)
  stride = factor if "reconstruction" in objectives else factor * 2 ** (len(model["unet"]["widths"]) - 1)
  if image_size % stride:
    raise UserError(
      f"image_size is {image_size}; autoencoder and UNet together halve it down by {stride}, so it must be a"
      f" multiple of {stride}, such as {max(1, round(image_size / stride)) * stride}"
    )
  unet = model["unet"]
  if len(unet["attention"]) != len(unet["widths"]):
    raise UserError(
      f"model.unet.attention has {len(unet['attention'])} entries and model.unet.widths {len(unet['widths'])};"
      " give one for each level"
    )
  for width in unet["widths"]:
    if width % unet["num_heads"] or width % unet["groups"]:
      raise UserError(
        f"model.unet.widths has {width}; each must be a multiple of num_heads={unet['num_heads']} and"
        f" groups={unet['groups']}"
      )
  for part in ("text_encoder", "alignment"):
    if model[part]["width"] % model[part]["num_heads"]:
      raise UserError(
        f"model.{part}.width is {model[part]['width']}; it must be a multiple of num_heads={model[part]['num_heads']}"
      )
  if not 2 <= max_length <= model["text_encoder"]["max_length"]:
    raise UserError(
      f"data.max_length is {max_length}; it must be from 2 to model.text_encoder.max_length,"
      f" {model['text_encoder']['max_length']}"
    )


def latent_factor(model: Mapping[str, Any]) -> int:
  """Pixels a side for one latent position."""
  return model["autoencoder"]["patch"] * 2 ** (len(model["autoencoder"]["widths"]) - 1)


def query_width(model: Mapping[str, Any]) -> int:
  """Width of the text query e."""
  return model["text_encoder"]["projection"] or model["text_encoder"]["width"]


def make(model: Mapping[str, Any], *, objectives: Collection[str]) -> Callable[[nnx.Rngs], DiffDis]:
  """A function from rngs to the module.

  Generation alone has no text stream and no alignment transformer: it is the Stable Diffusion baseline. Reconstruction
  is the autoencoder alone.
  """
  common: dict[str, Any] = dict(dtype=DTYPES[model["dtype"]])
  diffusion = "reconstruction" not in objectives
  discrimination = "discrimination" in objectives

  def build(rngs: nnx.Rngs) -> DiffDis:
    args = dict(common, rngs=rngs)
    autoencoder = Autoencoder(**model["autoencoder"], **args)
    text_encoder = unet = text_stream = alignment = None
    if diffusion:
      text_encoder = TextEncoder(**model["text_encoder"], **args)
      unet = UNet(
        **model["unet"],
        context_width=model["text_encoder"]["width"],
        latent_channels=model["autoencoder"]["latent_channels"],
        remat=model["remat"],
        up_path="generation" in objectives,
        **args,
      )
    if discrimination:
      text_stream = TextStream(
        unet.fused_widths if model["fusion"] else (),
        query_width=query_width(model),
        num_heads=model["unet"]["num_heads"],
        share_attention=model["share_attention"],
        modality_ffn=model["modality_ffn"],
        query_init=model["query_init"],
        **args,
      )
      alignment = AlignmentTransformer(
        query_width=query_width(model), image_width=model["unet"]["widths"][-1], **model["alignment"], **args
      )
    return DiffDis(
      autoencoder=autoencoder, text_encoder=text_encoder, unet=unet, text_stream=text_stream, alignment=alignment
    )

  return build


class _Rngs(nnx.Rngs):
  """nnx.Rngs that counts its keys in Python; the keys are the same.

  nnx's own counter asks a traced value for its sharding, and the error that answers walks the whole trace. Time then
  grows with the square of the number of parameters: half a minute instead of two seconds for Stable Diffusion v1.
  """

  def __init__(self, key: jax.Array):
    super().__init__(key)
    self._count = itertools.count()

  def params(self) -> jax.Array:
    return jax.random.fold_in(self.default.key[...], next(self._count))


def abstract(build: Callable[[nnx.Rngs], DiffDis]) -> tuple[nnx.GraphDef, nnx.State]:
  """Graph definition and shapes, with nothing allocated."""
  return nnx.split(nnx.eval_shape(lambda: build(_Rngs(jax.random.key(0)))))


def initialise(build: Callable[[nnx.Rngs], DiffDis], key: jax.Array) -> nnx.State:
  """Initial state; run under jit with out_shardings so that parameters are born sharded."""
  return nnx.state(build(_Rngs(key)))
