"""Make random weights for FID's Inception by torch-fidelity's network, so that no test downloads the published ones."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

LAYERS = ["64", "192", "768", "2048"]


class _Unloaded(FeatureExtractorInceptionV3):
  """torch-fidelity's network before it loads its weights from a file."""

  def __init__(self) -> None:
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    super().__init__("unloaded", LAYERS, feature_extractor_weights_path=empty)

  def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
    del args, kwargs


def randomise(module: torch.nn.Module, seed: int) -> None:
  """Fill a network so that its norms are far from the identity and no ReLU is dead."""
  generator = torch.Generator().manual_seed(seed)
  normal = lambda x: torch.randn(x.shape, generator=generator)
  uniform = lambda x: 0.5 + torch.rand(x.shape, generator=generator)
  with torch.no_grad():
    for layer in module.modules():
      if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
        layer.weight.copy_(normal(layer.weight) * (2 / layer.weight[0].numel()) ** 0.5)
        if layer.bias is not None:
          layer.bias.copy_(0.1 * normal(layer.bias))
      if isinstance(layer, torch.nn.BatchNorm2d):
        layer.running_mean.copy_(0.1 * normal(layer.running_mean))
        layer.running_var.copy_(uniform(layer.running_var))
        layer.weight.copy_(uniform(layer.weight))
        layer.bias.copy_(0.1 * normal(layer.bias))
        layer.num_batches_tracked.zero_()


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
  """Return a state dict with all the tensors of the published file."""
  with torch.device("meta"):
    network = _Unloaded()
  network.to_empty(device="cpu")
  randomise(network, seed)
  return network.state_dict()


@pytest.fixture(scope="session")
def inception_state() -> dict[str, torch.Tensor]:
  return random_state()


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory, inception_state: dict[str, torch.Tensor]) -> pathlib.Path:
  """Write the weights to a file as torch-fidelity does."""
  path = tmp_path_factory.getbasetemp() / "inception.pth"
  torch.save(inception_state, path)
  return path
