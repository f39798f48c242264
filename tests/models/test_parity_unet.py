"""Compare our UNet with diffusers' UNet2DConditionModel in Stable Diffusion v1's arrangement, with the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.models import from_torch, networks

TIMESTEPS = np.array([0, 1, 500, 999, 1000], np.int32)
CONTEXT_WIDTH = 16


def diffusers_unet(*, widths: tuple[int, ...], attention: tuple[bool, ...], depth: int) -> UNet2DConditionModel:
  down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
  return UNet2DConditionModel(
    block_out_channels=widths,
    down_block_types=down,
    up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
    layers_per_block=depth,
    attention_head_dim=2,  # in Stable Diffusion v1's configs, diffusers takes it as the number of heads
    cross_attention_dim=CONTEXT_WIDTH,
    norm_num_groups=4,
  )


@pytest.mark.parametrize(
  "size, widths, attention, depth",
  [
    ((8, 12), (8, 16, 24), (True, True, False), 1),
    # 144 tokens, so attention goes head by head on a CPU.
    ((12, 12), (8, 16), (True, False), 2),
  ],
)
def test_unet_equals_diffusers(size, widths, attention, depth):
  arrangement = dict(widths=widths, attention=attention, depth=depth)
  theirs = from_torch.randomise(diffusers_unet(**arrangement), seed=0)
  unet = networks.tiny_model()["unet"] | arrangement
  network = networks.diffdis(("generation",), unet=unet)
  shapes = {path: leaf for path, leaf in network.shapes.items() if path.startswith("unet.")}
  params = from_torch.to_ours(theirs, shapes)
  others = {path: leaf for path, leaf in network.shapes.items() if path not in shapes}

  rng = np.random.default_rng(1)
  x = rng.standard_normal((len(TIMESTEPS), *size, 4)).astype(np.float32)
  c = rng.standard_normal((len(TIMESTEPS), 7, CONTEXT_WIDTH)).astype(np.float32)
  run = network.jit(lambda model, x, t, c: model.generation(z_t=x, t_z=t, c=c))
  ours = run(params | networks.random_params(others, seed=2), x, TIMESTEPS, c)

  with torch.no_grad():
    expected = theirs(from_torch.nchw(x), torch.from_numpy(TIMESTEPS), torch.from_numpy(c)).sample
  assert networks.relative_error(ours, from_torch.nhwc(expected)) < 1e-5
  assert np.abs(np.diff(np.asarray(ours), axis=0)).max(axis=(1, 2, 3)).min() > 0.1, "the batch's rows should differ"
