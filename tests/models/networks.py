"""Make small networks with random parameters for the tests of models/."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from diffdis_jax.common.params import flatten, merge
from diffdis_jax.config.model import Model
from diffdis_jax.config.section import read_section
from diffdis_jax.method import network as build
from tests import tiny

BOTH = ("generation", "discrimination")
QUERY_WIDTH = 16


def tiny_model(**changes: Any) -> dict[str, Any]:
  """Return a `model` section with three levels, attention at the first two, in Stable Diffusion's arrangement."""
  model = tiny.get_config().model
  model.unet.update(widths=(8, 16, 24), attention=(True, True, False))
  model.text_encoder.update(vocab_size=99, bos_id=97, eos_id=98, depth=2)
  model.autoencoder.update(widths=(8, 16), depth=1, attention=True, patch=1)
  model.update(**changes)
  return model.to_dict()


def random_params(shapes: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
  """Return random parameters: each layer's outputs stay near unit scale, no norm is the identity, no bias is zero."""
  rng = np.random.default_rng(seed)
  params = {}
  for path, leaf in shapes.items():
    noise = rng.standard_normal(leaf.shape)
    if path.endswith("kernel"):
      value = noise / np.sqrt(np.prod(leaf.shape[:-1]))
    else:
      value = 0.2 * noise + path.endswith("scale")
    params[path] = value.astype(np.float32)
  return params


@dataclasses.dataclass
class Network:
  """Holds a module as pure functions of its flat parameters."""

  graphdef: nnx.GraphDef
  abstract: nnx.State

  @classmethod
  def of(cls, make: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    return cls(*build.abstract_module(make))

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(self.abstract)

  def pure(self, f: Callable[..., Any]) -> Callable[..., Any]:
    """Turn `f(module, ...)` into a function of (params, ...)."""
    return lambda params, *args, **kwargs: f(merge(self.graphdef, self.abstract, params), *args, **kwargs)

  def jit(self, f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(self.pure(f))


def diffdis(objectives: tuple[str, ...] = BOTH, **changes: Any) -> Network:
  return Network.of(builder(tiny_model(**changes), objectives))


def builder(model: Mapping[str, Any], objectives: Sequence[str]) -> Callable[[nnx.Rngs], nnx.Module]:
  """Return a function from rngs to the network of a `model` section."""
  return functools.partial(
    build.build_diffdis, read_section(Model, ConfigDict(model).to_dict(), "model"), tuple(objectives)
  )


def relative_error(actual: Any, expected: Any) -> float:
  """Return the largest deviation relative to the largest magnitude; NaN is an error, which `max` would miss."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.isfinite(actual).all() and np.isfinite(expected).all()
  return float(np.abs(actual - expected).max() / np.abs(expected).max())
