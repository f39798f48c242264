"""Convert weights of the PyTorch implementations (diffusers, transformers) to our parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diffdis_jax.interop import mapping


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Randomise a module: norms are not the identity, biases are not zero, and outputs stay near unit scale."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        noise = noise if "embedding.weight" in name else noise / parameter[0].numel() ** 0.5
      else:
        noise = 0.2 * noise + name.endswith("weight")
      parameter.copy_(noise)
  return module.eval()


def to_ours(module: torch.nn.Module, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Return the values of the parameters in `shapes` from `module`, and check that each of its parameters is used."""
  values = {name: value.detach().numpy() for name, value in module.named_parameters()}
  entries = [mapping.from_path(path) for path in shapes]
  # A model of transformers 5 in memory has no such prefix.
  names = {entry: entry.name.removeprefix("text_model.") for entry in entries}
  assert sorted(names.values()) == sorted(values)
  params = {entry.path: np.asarray(entry.to_ours(values[name]), np.float32) for entry, name in names.items()}
  for path, value in params.items():
    assert value.shape == shapes[path].shape, path
  return params


def nchw(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
  return np.moveaxis(x.detach().numpy(), 1, -1)
