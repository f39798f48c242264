"""How CLIP's parameters start from scratch: OpenAI's spreads in the text tower, and in the vision tower, for which
OpenAI gave none, PyTorch's defaults, as open_clip has them (transformer.py, `init_parameters`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffdis_jax.common.params import Params, first_match
from diffdis_jax.config.model import ClipModel, TextEncoderSize, VisionEncoderSize


class Start(NamedTuple):
  """What a parameter is drawn from: "normal" of this deviation, "uniform" within ± this bound, or "constant"."""

  kind: str
  value: float


Rules = tuple[tuple[str, Start], ...]

# Of both towers.
COMMON: Rules = (
  (r"norm\.scale$", Start("constant", 1.0)),
  (r"norm\.bias$|\.(q|k|v|out)\.bias$", Start("constant", 0.0)),
)


def initialise(key: jax.Array, shapes: Params, model: ClipModel) -> Params:
  """Fresh parameters f32, each drawn with a key of its own.

  Raises:
    UserError: a parameter that no rule matches.
  """
  scale = (r"^logit_scale$", Start("constant", math.log(model.temperature)))
  rules = (scale, *COMMON, *_text(model.text_encoder), *_vision(model.vision_encoder))
  return {
    path: _draw(jax.random.fold_in(key, i), leaf.shape, first_match(path, rules, "clip_init"))
    for i, (path, leaf) in enumerate(shapes.items())
  }


def _draw(key: jax.Array, shape: tuple[int, ...], start: Start) -> Float[Array, "..."]:
  if start.kind == "normal":
    return start.value * jax.random.normal(key, shape)
  if start.kind == "uniform":
    return jax.random.uniform(key, shape, minval=-start.value, maxval=start.value)
  return jnp.full(shape, start.value, jnp.float32)


def _text(size: TextEncoderSize) -> Rules:
  """Residual branches start the smaller the more of them there are. Only the biases of the MLP are PyTorch's."""
  spread, residual = size.width**-0.5, (2 * size.depth) ** -0.5
  return (
    (r"^text_encoder\.tokens\.", Start("normal", 0.02)),
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
  """PyTorch's defaults are uniform: within ± fan_in^-1/2, and by Xavier's rule over q, k and v as one matrix."""
  spread = size.width**-0.5
  return (
    (r"^vision_encoder\.(class_token|positions|projection\.kernel)$", Start("normal", spread)),
    (r"^vision_encoder\.patch\.kernel$", Start("uniform", (3 * size.patch**2) ** -0.5)),
    (r"^vision_encoder\..*\.(q|k|v)\.kernel$", Start("uniform", math.sqrt(6 / (4 * size.width)))),
    (r"^vision_encoder\..*\.(out|fc1)\.kernel$", Start("uniform", spread)),
    (r"^vision_encoder\..*\.fc1\.bias$", Start("uniform", spread)),
    (r"^vision_encoder\..*\.fc2\.(kernel|bias)$", Start("uniform", size.mlp_width**-0.5)),
  )
