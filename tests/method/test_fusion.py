"""Compare the dual-stream fusion block with a float64 PyTorch one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from flax import nnx

from diffdis_jax.config.model import Model, TextEncoderSize, UNetSize
from diffdis_jax.method.fusion import FusionBlock
from diffdis_jax.models.unet_blocks import SpatialTransformer
from tests.models import from_torch, networks, oracle

WIDTH, QUERY_WIDTH, CONTEXT_WIDTH, HEADS = 8, 12, 16, 2
MODEL = Model(unet=UNetSize(num_heads=HEADS), text_encoder=TextEncoderSize(width=QUERY_WIDTH))
SWITCHES = [(True, True), (True, False), (False, True), (False, False)]


class Both(nnx.Module):
  """Holds the image stream's block under the path that from_torch knows, and the text token's block."""

  def __init__(self, *, share_attention: bool, modality_ffn: bool, rngs: nnx.Rngs):
    common = dict(dtype=jnp.float32, rngs=rngs)
    attention = SpatialTransformer(WIDTH, num_heads=HEADS, context_width=CONTEXT_WIDTH, groups=4, **common)
    self.unet = nnx.Dict(middle=nnx.Dict(attention=attention))
    model = dataclasses.replace(MODEL, share_attention=share_attention, modality_ffn=modality_ffn)
    self.text = FusionBlock(WIDTH, model, **common)

  def __call__(self, x, c, h_e, e_t):
    return self.text(self.unet.middle.attention, x, c, h_e, e_t)


class MidBlock(torch.nn.Module):
  def __init__(self):
    super().__init__()
    block = Transformer2DModel(
      num_attention_heads=HEADS,
      attention_head_dim=WIDTH // HEADS,
      in_channels=WIDTH,
      cross_attention_dim=CONTEXT_WIDTH,
      norm_num_groups=4,
    )
    self.mid_block = torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([block])})


def build(share_attention: bool, modality_ffn: bool):
  """Return our network, its parameters, and the image stream's block in float64 PyTorch."""
  switches = dict(share_attention=share_attention, modality_ffn=modality_ffn)
  network = networks.Network.of(lambda rngs: Both(**switches, rngs=rngs))
  theirs = from_torch.randomise(MidBlock(), seed=0)
  image = {path: leaf for path, leaf in network.shapes.items() if path.startswith("unet.")}
  text = {path: leaf for path, leaf in network.shapes.items() if path.startswith("text.")}
  params = from_torch.to_ours(theirs, image) | networks.random_params(text, seed=1)
  return network, params, theirs.mid_block["attentions"][0].double()


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(2)
  shapes = dict(x=(3, 4, 6, WIDTH), c=(3, 5, CONTEXT_WIDTH), h_e=(3, QUERY_WIDTH), e_t=(3, QUERY_WIDTH))
  return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("share_attention, modality_ffn", SWITCHES)
def test_block_equals_the_papers(share_attention, modality_ffn, inputs):
  network, params, image_block = build(share_attention, modality_ffn)
  ours = network.jit(lambda block, **inputs: block(**inputs))(params, **inputs)

  expected = oracle.fused_block(
    image_block,
    oracle.Weights(params, "text."),
    x=from_torch.nchw(np.asarray(inputs["x"])).double(),
    c=torch.from_numpy(np.array(inputs["c"])).double(),
    u=torch.from_numpy(np.array(inputs["h_e"] + inputs["e_t"])).double(),
    num_heads=HEADS,
    share_attention=share_attention,
    modality_ffn=modality_ffn,
  )
  assert networks.relative_error(ours[0], from_torch.nhwc(expected[0])) < 1e-5
  assert networks.relative_error(ours[1], expected[1].detach()) < 1e-5


def test_every_parameter_of_the_text_token_learns(inputs):
  network, params, _ = build(share_attention=False, modality_ffn=True)  # has most such parameters
  total = network.pure(lambda block: sum(jnp.sum(jnp.sin(y)) for y in block(**inputs)))
  gradient = jax.jit(jax.grad(total))(params)
  assert all(np.abs(gradient[path]).max() > 1e-4 for path in params if path.startswith("text."))


def test_text_token_takes_no_cross_attention_of_its_own(inputs):
  """c influences the text token only at the next block, through the image stream's tokens."""
  network, params, _ = build(True, True)
  run = network.jit(lambda block, **inputs: block(**inputs))
  x, h_e = run(params, **inputs)
  x_other, h_e_other = run(params, **inputs | dict(c=inputs["c"] + 1))
  assert np.abs(x - x_other).max() > 1e-2
  np.testing.assert_array_equal(h_e, h_e_other)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_query_init_scales_what_the_query_brings_in(scale):
  block = lambda query_init: FusionBlock(
    WIDTH, dataclasses.replace(MODEL, query_init=query_init), dtype=jnp.float32, rngs=nnx.Rngs(0)
  )
  kernel, scaled = block(1.0).fc_in.kernel[...], block(scale).fc_in.kernel[...]
  assert 0.5 / QUERY_WIDTH < jnp.var(kernel) < 2 / QUERY_WIDTH
  np.testing.assert_array_equal(scaled, scale * kernel)
