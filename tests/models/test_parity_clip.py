"""Compare our CLIP with transformers' CLIPModel, with the same weights: tiny in CI, OpenAI's sizes with -m full."""

from __future__ import annotations

import logging
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from open_clip.model import resize_pos_embed
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffdis_jax.config.model import TEMPERATURE, TextEncoderSize, VisionEncoderSize
from diffdis_jax.interop import mapping
from diffdis_jax.models import sizes
from diffdis_jax.models.clip import Clip, VisionEncoder, resize_positions
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.structs import TextCondition
from tests.models import from_torch, networks
from tests.models.test_parity_text_encoder import TOKENS, clip_config

PROJECTION = 12
# Each row: our `model` section; OpenAI's release of that name as transformers' config; and its parameter count.
RELEASED = [
  pytest.param(sizes.clip_vit_b32(), CLIPConfig(), 151_277_313, id="ViT-B/32"),
  pytest.param(
    sizes.clip_vit_l14(),
    CLIPConfig(
      text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
      vision_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
      ),
      projection_dim=768,
    ),
    427_616_513,
    id="ViT-L/14",
  ),
]


def ours(section: Mapping[str, Any], *, dtype: Any = jnp.float32) -> networks.Network:
  def make(rngs: nnx.Rngs) -> Clip:
    args = dict(remat="none", dtype=dtype, rngs=rngs)
    return Clip(
      text_encoder=TextEncoder(TextEncoderSize(**section["text_encoder"]), **args),
      vision_encoder=VisionEncoder(VisionEncoderSize(**section["vision_encoder"]), **args),
      head=None,
      temperature=TEMPERATURE,
    )

  return networks.Network.of(make)


def encode(model: Clip, image: np.ndarray, tokens: np.ndarray) -> tuple[jax.Array, TextCondition]:
  return model.encode_image(image), model.encode_text(tokens)


def tiny(*, dtype: Any = jnp.float32, **changes: Any) -> networks.Network:
  vision = dict(image_size=8, patch=4, width=24, depth=2, num_heads=3, mlp_width=32, activation="quick_gelu")
  vision |= dict(projection=PROJECTION) | changes
  text = networks.tiny_model()["text_encoder"] | dict(projection=PROJECTION, activation=vision["activation"])
  return ours(dict(text_encoder=text, vision_encoder=vision), dtype=dtype)


def tiny_theirs(*, image_size: int, patch: int, activation: str) -> CLIPModel:
  vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3)
  vision |= dict(image_size=image_size, patch_size=patch, hidden_act=activation)
  text = clip_config(hidden_act=activation).to_dict()
  return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def to_ours(theirs: CLIPModel, network: networks.Network) -> dict[str, np.ndarray]:
  """Return every parameter of `theirs`, and check that `network` has no other."""
  entries = {name: mapping.from_name("clip", name) for name, _ in theirs.named_parameters()}
  params = {entries[name].path: entries[name].to_ours(x.detach().numpy()) for name, x in theirs.named_parameters()}
  assert {path: x.shape for path, x in params.items()} == {path: leaf.shape for path, leaf in network.shapes.items()}
  return params


def assert_equal_embeddings(
  network: networks.Network, theirs: CLIPModel, image: np.ndarray, tokens: np.ndarray, *, tolerance: float
) -> None:
  image_query, text = jax.jit(network.pure(encode))(to_ours(theirs, network), image, tokens)
  pixels = ((image / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD).astype(np.float32)
  with torch.no_grad():
    expected = theirs(input_ids=torch.from_numpy(tokens).long(), pixel_values=from_torch.nchw(pixels))
  assert image_query.dtype == np.float32
  image_error = networks.relative_error(image_query, expected.image_embeds)
  text_error = networks.relative_error(text.e, expected.text_embeds)
  logging.getLogger(__name__).info("max abs error of the largest: image %.1e, text %.1e", image_error, text_error)
  assert max(image_error, text_error) < tolerance
  differences = np.abs(np.diff(image_query, axis=0)).max(axis=1)
  assert differences.min() > 100 * tolerance * np.abs(image_query).max(), "the images' embeddings should differ"


def images(n: int, size: int) -> np.ndarray:
  """Return images, each darker than the previous one."""
  pixels = np.random.default_rng(4).integers(0, 256, (n, size, size, 3), np.uint8)
  return pixels // np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]


@pytest.mark.parametrize(
  "image_size, patch, activation",
  [
    (8, 4, "quick_gelu"),
    (9, 3, "gelu"),
    # 145 tokens, so attention goes head by head on a CPU
    (24, 2, "quick_gelu"),
  ],
)
def test_clip_equals_transformers(image_size, patch, activation):
  arrangement = dict(image_size=image_size, patch=patch, activation=activation)
  theirs = from_torch.randomise(tiny_theirs(**arrangement), seed=0)
  assert_equal_embeddings(tiny(**arrangement), theirs, images(3, image_size), TOKENS, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(8, 12), (12, 12), (4, 4), (16, 20)])
def test_positions_of_other_sizes_are_interpolated_as_in_open_clip(shape):
  """A 2 x 2 grid is resized to other grids."""
  rows, columns = shape[0] // 4, shape[1] // 4
  positions = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
  state = {"visual.positional_embedding": torch.from_numpy(positions)}
  grid = types.SimpleNamespace(visual=types.SimpleNamespace(grid_size=(rows, columns)))
  resize_pos_embed(state, grid)
  resized = resize_positions(jnp.asarray(positions), rows=rows, columns=columns)
  assert networks.relative_error(resized, state["visual.positional_embedding"]) < 1e-6
  network = tiny()
  image, _ = jax.eval_shape(network.pure(encode), network.shapes, np.zeros((1, *shape, 3), np.uint8), TOKENS)
  assert image.shape == (1, PROJECTION)


@pytest.mark.parametrize("section, config, count", RELEASED)
def test_a_released_size_has_transformers_parameters(section, config, count):
  with torch.device("meta"):
    theirs = CLIPModel(config)
  shapes = {mapping.from_name("clip", name): tuple(x.shape) for name, x in theirs.named_parameters()}
  expected = {entry.path: entry.to_ours(np.broadcast_to(0.0, shape)).shape for entry, shape in shapes.items()}
  shapes = {path: leaf.shape for path, leaf in ours(section).shapes.items()}
  assert shapes == expected
  assert sum(math.prod(shape) for shape in shapes.values()) == count


def random_images(side: int = 8) -> np.ndarray:
  return np.random.default_rng(5).standard_normal((3, side, side, 3)).astype(np.float32)


def torch_of(params: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
  return {name: torch.tensor(value, dtype=torch.float64) for name, value in params.items()}


def boxes(x: torch.Tensor, parts: int) -> torch.Tensor:
  """Return the means over boxes of [b, c, h, w], each box's channels side by side."""
  return torch.nn.functional.adaptive_avg_pool2d(x, parts).permute(0, 2, 3, 1).flatten(1)


def test_a_head_over_parts_adds_their_means_by_a_matrix_of_its_own():
  """The reference is transformers' tower in float64 with this head."""
  theirs = from_torch.randomise(tiny_theirs(image_size=16, patch=4, activation="gelu"), seed=0)
  arrangement: dict[str, Any] = dict(image_size=16, patch=4, activation="gelu")
  pooled = tiny(**arrangement, spatial_pool=2)
  params = to_ours(theirs, tiny(**arrangement))
  params["vision_encoder.map_out.kernel"] = np.random.default_rng(1).standard_normal((4 * 24, PROJECTION)) / 10
  params = {path: np.float32(value) for path, value in params.items()}
  assert {path: value.shape for path, value in params.items()} == {k: leaf.shape for k, leaf in pooled.shapes.items()}
  pixels = random_images(16)
  pooled_e = pooled.jit(lambda model, x: model.vision_encoder(x))(params, pixels)

  with torch.no_grad():
    double = theirs.double()
    features = double.vision_model(pixel_values=torch.tensor(np.float64(pixels)).permute(0, 3, 1, 2))
    alone = double.visual_projection(features.pooler_output)
    tokens = double.vision_model.post_layernorm(features.last_hidden_state[:, 1:])
  added = boxes(tokens.unflatten(1, (4, 4)).permute(0, 3, 1, 2), 2) @ torch_of(params)["vision_encoder.map_out.kernel"]
  assert networks.relative_error(pooled_e, alone + added) < 1e-5
  assert added.abs().max() > 0.1 * alone.abs().max()
