"""CLIP, the baseline of the paper's Table 1: a vision tower, the text tower, and their initialisation.

The text tower is initialised with OpenAI's deviations, and the vision tower, for which OpenAI gave none, with PyTorch's
defaults, both as in open_clip (transformer.py, `init_parameters`).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.common.params import Params, first_match
from diffdis_jax.config.model import ClipModel, TextEncoderSize, VisionEncoderSize
from diffdis_jax.errors import UserError
from diffdis_jax.models.layers import LayerNorm, TransformerLayer, conv, linear
from diffdis_jax.models.lgr import LanguageGuidedHead
from diffdis_jax.models.remat import run_block
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.structs import TextCondition

# The mean and deviation of the pixels, RGB in [0, 1], of CLIP's training images (OpenAI's release).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Start(NamedTuple):
  """The distribution of an initial parameter: "normal" with this deviation, "uniform" within ± this bound, "fan_in"
  within ± this bound over the root of the kernel's fan-in, or "constant"."""

  kind: str
  value: float


Rules = tuple[tuple[str, Start], ...]


def normalise(image: UInt8[Array, "b H W 3"] | Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
  """Normalise pixels of 0 to 255, u8 or f32, by CLIP's mean and deviation."""
  # Computed on the device: from the host, a batch in f32 would be four times as many bytes to move.
  scale, shift = (jnp.asarray(value, jnp.float32) for value in (PIXEL_STD, PIXEL_MEAN))
  return (image.astype(jnp.float32) / 255.0 - shift) / scale


def resize_positions(positions: Float[Array, "n d"], *, rows: int, columns: int) -> Float[Array, "m d"]:
  """Resize learned position embeddings of a square grid of patches, as open_clip's resize_pos_embed does.

  The resizing is bicubic, and antialiased for a smaller grid. The first embedding, the class token's, is unchanged.
  """
  side, width = math.isqrt(len(positions) - 1), positions.shape[-1]
  if (rows, columns) == (side, side):
    return positions
  grid = jax.image.resize(positions[1:].reshape(side, side, width), (rows, columns, width), "bicubic")
  return jnp.concatenate([positions[:1], grid.reshape(rows * columns, width)])


def mean_parts(x: Float[Array, "b h w c"], parts: int) -> Float[Array, "b d"]:
  """Compute the means over parts x parts boxes of a map, and concatenate them."""
  return reduce(x, "b (i h) (j w) c -> b (i j c)", "mean", i=parts, j=parts)


class VisionEncoder(nnx.Module):
  """CLIP's vision tower, from an image to the projection of the class token.

  Args:
    remat: a key of remat.REMAT_POLICIES, applied to each layer.
  """

  RULES: Rules = ()  # the initialisation of parameters that only this tower has

  def __init__(self, size: VisionEncoderSize, *, remat: str, dtype: DTypeLike, rngs: nnx.Rngs):
    self.side, self.spatial_pool, self.dtype, self.remat = size.patch, size.spatial_pool, dtype, remat
    width, patch, dense = size.width, size.patch, functools.partial(linear, use_bias=False, dtype=dtype, rngs=rngs)
    whole = ((0, 0), (0, 0))  # no padding: patches tile the image
    self.patch = conv(3, width, patch, stride=patch, padding=whole, use_bias=False, dtype=dtype, rngs=rngs)
    init = nnx.initializers.normal(width**-0.5)
    self.class_token = nnx.Param(init(rngs.params(), (width,), jnp.float32))
    self.positions = nnx.Param(init(rngs.params(), ((size.image_size // patch) ** 2 + 1, width), jnp.float32))
    # A norm before the layers, transformers' "pre_layrnorm", which the text tower lacks.
    self.pre_norm = LayerNorm(width, rngs=rngs)
    self.layers = nnx.List(
      TransformerLayer(
        width, num_heads=size.num_heads, mlp_width=size.mlp_width, activation=size.activation, dtype=dtype, rngs=rngs
      )
      for _ in range(size.depth)
    )
    self.norm = LayerNorm(width, rngs=rngs)
    self.projection = dense(width, size.projection)
    if size.spatial_pool:
      self.map_out = dense(size.spatial_pool**2 * width, size.projection)

  def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b d"]:
    """Return embeddings of normalised images, f32, of any length. For images of another size, the position embeddings
    are interpolated.

    Raises UserError: patches do not tile the images.
    """
    check_tiles(x, self.side)
    patches = self.patch(x)
    tokens = rearrange(patches, "b h w d -> b (h w) d")
    positions = resize_positions(self.positions[...], rows=patches.shape[1], columns=patches.shape[2])
    # The class token comes first; resize_positions and the last line rely on it.
    start = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (len(x), 1, tokens.shape[-1]))
    h = self.pre_norm(jnp.concatenate([start, tokens], axis=1) + positions.astype(self.dtype))
    for layer in self.layers:
      h = run_block(lambda layer, h: layer(h), layer, h, remat=self.remat)
    # Only the class token is used from here, so that the norm and the projection are not computed for patches.
    query = self.projection(self.norm(h[:, :1]))[:, 0].astype(jnp.float32)
    if not self.spatial_pool:
      return query
    parts = mean_parts(self.norm(h[:, 1:]).reshape(patches.shape), self.spatial_pool)
    return query + self.map_out(parts).astype(jnp.float32)


def check_tiles(x: Float[Array, "b H W 3"], stride: int) -> None:
  """Raise UserError if boxes of this side do not tile the images."""
  height, width = x.shape[1:3]
  if height % stride or width % stride:
    raise UserError(
      f"images are {height} x {width} px; patches of {stride} px do not tile them, so resize and crop them to a"
      f" multiple of {stride}"
    )


# Vision towers by `model.vision_encoder.tower`; an extension adds others here and in config.model.TOWERS.
TOWERS: dict[str, Any] = {"transformer": VisionEncoder}


class Clip(nnx.Module):
  """CLIP's two towers and its learnable scale.

  Args:
    text_encoder: with a projection, to the vision tower's width.
    vision_encoder: one of TOWERS.
    head: the head of a long-tailed run's second stage.
    temperature: the initial τ.
  """

  def __init__(
    self,
    *,
    text_encoder: TextEncoder,
    vision_encoder: nnx.Module,
    head: LanguageGuidedHead | None,
    temperature: float,
  ):
    self.text_encoder = text_encoder
    self.vision_encoder: Any = vision_encoder
    self.head: Any = head
    self.logit_scale = nnx.Param(jnp.asarray(math.log(temperature), jnp.float32))

  def encode_image(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b d"]:
    """Return L2-normalised embeddings, f32. Raises UserError: patches do not tile the images."""
    query = self.vision_encoder(normalise(image))
    return query * jax.lax.rsqrt(jnp.sum(query**2, axis=-1, keepdims=True) + 1e-12)

  def encode_text(self, tokens: Int[Array, "b l"]) -> TextCondition:
    """Return the condition, which CLIP does not use, and the L2-normalised embedding e."""
    return self.text_encoder(tokens)


# Rules for both towers.
COMMON: Rules = (
  (r"norm\.scale$", Start("constant", 1.0)),
  (r"norm\.bias$|\.(q|k|v|out)\.bias$", Start("constant", 0.0)),
)


def initialise(key: jax.Array, shapes: Params, model: ClipModel) -> Params:
  """Return initial parameters, f32, each sampled with its own key.

  Raises UserError: a parameter that no rule matches.
  """
  scale = (r"^logit_scale$", Start("constant", math.log(model.temperature)))
  rules = (scale, *COMMON, *_text(model.text_encoder), *_vision(model.vision_encoder))
  # A key depends on the parameter's place in the listing, so that no value depends on another parameter's shape.
  return {
    path: _draw(jax.random.fold_in(key, i), leaf.shape, first_match(path, rules, "models/clip.py"))
    for i, (path, leaf) in enumerate(shapes.items())
  }


def _draw(key: jax.Array, shape: tuple[int, ...], start: Start) -> Float[Array, "..."]:
  if start.kind == "normal":
    return start.value * jax.random.normal(key, shape)
  if start.kind in ("uniform", "fan_in"):
    bound = start.value * (math.prod(shape[:-1]) ** -0.5 if start.kind == "fan_in" else 1.0)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
  return jnp.full(shape, start.value, jnp.float32)


def _text(size: TextEncoderSize) -> Rules:
  """Return the text tower's rules. The more residual branches there are, the smaller they start. Only the MLP's biases
  have PyTorch's defaults."""
  spread, residual = size.width**-0.5, (2 * size.depth) ** -0.5
  return (
    (r"^text_encoder\.tokens\.", Start("normal", 0.02)),
    # The second token embeddings, which are not CLIP's, start at 0.
    (r"^text_encoder\.query_tokens\.", Start("constant", 0.0)),
    (r"^text_encoder\.positions$", Start("normal", 0.01)),
    (r"^text_encoder\..*\.(q|k|v)\.kernel$", Start("normal", spread)),
    (r"^text_encoder\..*\.(out|fc2)\.kernel$", Start("normal", spread * residual)),
    (r"^text_encoder\..*\.fc1\.kernel$", Start("normal", (2 * size.width) ** -0.5)),
    (r"^text_encoder\.projection\.kernel$", Start("normal", spread)),
    (r"^text_encoder\..*\.fc1\.bias$", Start("uniform", size.width**-0.5)),
    (r"^text_encoder\..*\.fc2\.bias$", Start("uniform", size.mlp_width**-0.5)),
  )


def _vision(size: VisionEncoderSize) -> Rules:
  """Return the vision tower's rules, PyTorch's defaults: uniform within ± fan_in^-1/2, or by Xavier's rule for q, k and
  v as one matrix."""
  spread = size.width**-0.5
  return (
    *TOWERS[size.tower].RULES,
    # The head over parts, which is not CLIP's, starts so that its output has the deviation of the class token's.
    (r"^vision_encoder\.map_out\.kernel$", Start("normal", spread / max(size.spatial_pool, 1))),
    (r"^vision_encoder\.(class_token|positions|projection\.kernel)$", Start("normal", spread)),
    (r"^vision_encoder\.patch\.kernel$", Start("uniform", (3 * size.patch**2) ** -0.5)),
    # Xavier's bound is sqrt(6 / (fan_in + fan_out)), for one matrix of width x 3 width.
    (r"^vision_encoder\..*\.(q|k|v)\.kernel$", Start("uniform", math.sqrt(6 / (4 * size.width)))),
    (r"^vision_encoder\..*\.(out|fc1)\.kernel$", Start("uniform", spread)),
    (r"^vision_encoder\..*\.fc1\.bias$", Start("uniform", spread)),
    (r"^vision_encoder\..*\.fc2\.(kernel|bias)$", Start("uniform", size.mlp_width**-0.5)),
  )
