"""Test CLIP's convolutional tower against torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffdis_jax.config.model import VisionEncoderSize
from diffdis_jax.errors import UserError
from replication.convolutional import LEVELS, ConvolutionalEncoder
from tests.models import networks
from tests.models.test_parity_clip import boxes, random_images, torch_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("parts", [0, 2])
def test_it_equals_torch_in_float64(parts):
  size = VisionEncoderSize(
    tower="convolutional", patch=2, depth=1, width=32, num_heads=4, projection=12, spatial_pool=parts
  )
  network = networks.Network.of(lambda rngs: ConvolutionalEncoder(size, remat="none", dtype=jnp.float32, rngs=rngs))
  params = networks.random_params(network.shapes, seed=0)
  images = random_images(16)
  w = torch_of(params)

  def conv(name: str, x: torch.Tensor, **how: int) -> torch.Tensor:
    return torch.nn.functional.conv2d(x, w[f"{name}.kernel"].permute(3, 2, 0, 1), w.get(f"{name}.bias"), **how)

  def activated(name: str, x: torch.Tensor) -> torch.Tensor:
    scale, bias = w[f"{name}.norm.scale"], w[f"{name}.norm.bias"]
    return torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8, scale, bias, eps=1e-5))

  h = conv("patch", torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2), stride=2)
  for level in range(LEVELS):
    block = f"down.{level}.resnets.0"
    inner = conv(f"{block}.conv1", activated(f"{block}.norm1", h), padding=1)
    inner = conv(f"{block}.conv2", activated(f"{block}.norm2", inner), padding=1)
    h = inner + (conv(f"{block}.shortcut", h) if level else h)
    if level < LEVELS - 1:
      h = conv(f"down.{level}.downsample.conv", h, stride=2, padding=1)
  h = activated("norm", h)
  want = h.mean(dim=(2, 3)) @ w["projection.kernel"]
  if parts:
    want = want + boxes(h, parts) @ w["map_out.kernel"]
  np.testing.assert_allclose(network.jit(lambda model, x: model(x))(params, images), want, atol=1e-5)
  with pytest.raises(UserError, match="patches of 8 px do not tile them"):
    network.jit(lambda model, x: model(x))(params, random_images(12))
