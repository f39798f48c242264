"""Compare our CLIP text tower with transformers' CLIPTextModel, with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffdis_jax.config.model import TextEncoderSize
from diffdis_jax.models.text_encoder import TextEncoder
from tests.models import from_torch, networks

BOS, EOS = 97, 98
# The end of text is at position 3, at the very end, and right after the start; the rest is padding, which is EOS too.
TOKENS = np.array(
  [[BOS, 5, 6, EOS, EOS, EOS, EOS], [BOS, 1, 2, 3, 4, 5, EOS], [BOS, EOS, EOS, EOS, EOS, EOS, EOS]], np.int32
)


def ours(**changes: Any) -> networks.Network:
  size = TextEncoderSize(**networks.tiny_model()["text_encoder"] | changes)
  return networks.Network.of(lambda rngs: TextEncoder(size, remat="none", dtype=np.float32, rngs=rngs))


def clip_config(**changes: Any) -> CLIPTextConfig:
  return CLIPTextConfig(
    vocab_size=99,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
    bos_token_id=BOS,
    eos_token_id=EOS,
    **changes,
  )


def to_ours(theirs: torch.nn.Module, network: networks.Network) -> dict[str, np.ndarray]:
  params = from_torch.to_ours(theirs, {f"text_encoder.{path}": leaf for path, leaf in network.shapes.items()})
  return {path.removeprefix("text_encoder."): value for path, value in params.items()}


def unit(x: torch.Tensor) -> torch.Tensor:
  return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder_equals_transformers(activation):
  theirs = from_torch.randomise(CLIPTextModel(clip_config(hidden_act=activation)), seed=0)
  network = ours(activation=activation)
  text = network.jit(lambda model, tokens: model(tokens))(to_ours(theirs, network), TOKENS)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(TOKENS).long())
  assert networks.relative_error(text.c, expected.last_hidden_state) < 1e-5
  assert networks.relative_error(text.e, unit(expected.pooler_output)) < 1e-5


def test_query_through_clips_projection():
  theirs = from_torch.randomise(CLIPTextModelWithProjection(clip_config(hidden_act="quick_gelu", projection_dim=12)), 1)
  # The model with the projection has the tower one level deeper.
  theirs = torch.nn.ModuleDict({"tower": theirs.text_model, "text_projection": theirs.text_projection})
  flat = torch.nn.Module()
  for name, child in [*theirs.tower.named_children(), ("text_projection", theirs.text_projection)]:
    flat.add_module(name, child)
  network = ours(projection=12)
  text = network.jit(lambda model, tokens: model(tokens))(to_ours(flat, network), TOKENS)
  with torch.no_grad():
    hidden = theirs.tower(torch.from_numpy(TOKENS).long())
    expected = theirs.text_projection(hidden.pooler_output)
  assert networks.relative_error(text.c, hidden.last_hidden_state) < 1e-5
  assert networks.relative_error(text.e, unit(expected)) < 1e-5


def test_token_vectors_in_the_query():
  network, plain = ours(token_embedding_weight=0.7), ours()
  params = networks.random_params(network.shapes, seed=0)
  table = params["query_tokens.embedding"]
  text = network.jit(lambda model, tokens: model(tokens))(params, TOKENS)
  others = {path: value for path, value in params.items() if path in plain.shapes}
  at_end = plain.jit(lambda model, tokens: model.query(model(tokens).c, tokens))(others, TOKENS)
  # Start, end and padding do not count; a caption without words adds nothing.
  means = np.stack([table[[5, 6]].mean(axis=0), table[[1, 2, 3, 4, 5]].mean(axis=0), np.zeros_like(table[0])])
  expected = torch.from_numpy(np.asarray(at_end) + 0.7 * means)
  assert networks.relative_error(text.e, unit(expected)) < 1e-5


def test_null_tokens_are_the_empty_prompt():
  network = ours()
  params = networks.random_params(network.shapes, seed=0)
  null = network.pure(lambda model: model.null_tokens(7))(params)
  np.testing.assert_array_equal(null, TOKENS[2:])
