"""Compare the alignment transformer with PyTorch's own transformer layers in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffdis_jax.config.model import AlignmentSize
from diffdis_jax.method.alignment import AlignmentTransformer
from tests.models import from_torch, networks, oracle


@pytest.mark.parametrize("spatial_pool", [0, 2])
def test_alignment_equals_pytorch(spatial_pool):
  size = AlignmentSize(width=16, depth=2, num_heads=4, spatial_pool=spatial_pool)
  network = networks.Network.of(
    lambda rngs: AlignmentTransformer(size, query_width=12, image_width=8, dtype=np.float32, rngs=rngs)
  )
  params = networks.random_params(network.shapes, seed=0)
  rng = np.random.default_rng(1)
  h_e = rng.standard_normal((3, 12)).astype(np.float32)
  features = rng.standard_normal((3, 2, 6, 8)).astype(np.float32)
  ours = network.jit(lambda model, h_e, features: model(h_e, features))(params, h_e, features)
  expected = oracle.alignment(
    oracle.Weights(params, ""),
    h_e=torch.from_numpy(h_e).double(),
    features=from_torch.nchw(features).double(),
    depth=2,
    num_heads=4,
    spatial_pool=spatial_pool,
  )
  assert networks.relative_error(ours, expected.detach()) < 1e-5
