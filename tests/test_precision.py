"""Test that float32 programs multiply in float32: on TPUs and GPUs JAX's default is bf16 or TF32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core
from jax.lax import Precision

from tests import steps
from tests.steps import build_trainer, network_of

PRODUCTS = ("dot_general", "conv_general_dilated")


def products(jaxpr: core.Jaxpr) -> Iterator[Any]:
  """Yield every matrix product and convolution, also of inner functions."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in PRODUCTS:
      yield equation
    for value in equation.params.values():
      for item in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(item, "jaxpr", item)
        if isinstance(inner, core.Jaxpr):
          yield from products(inner)


def precisions(jaxpr: core.ClosedJaxpr) -> dict[tuple[str, Any], int]:
  """Count the products of each kind with each precision."""
  counts: dict[tuple[str, Any], int] = {}
  for equation in products(jaxpr.jaxpr):
    precision = equation.params["precision"]
    first, second = precision if isinstance(precision, tuple) else (precision, precision)
    assert first == second
    key = equation.primitive.name, first
    counts[key] = counts.get(key, 0) + 1
  return counts


def trace(name: str, **changes: Any) -> core.ClosedJaxpr:
  config = steps.make_config(**changes)
  if name != "train":
    return steps.make_inference(config, mesh=steps.make_mesh(), batch_size=4).trace(name).jaxpr
  step = build_trainer(config, steps.make_mesh())
  batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, steps.make_batch(config)))
  return step.train_step.trace(step.abstract_state, batch).jaxpr


PROGRAMS = ("train", "generation", "discrimination")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_of_a_float32_program_is_in_float32(name):
  counts = precisions(trace(name))
  assert counts.keys() == {(kind, Precision.HIGHEST) for kind in PRODUCTS}
  accumulated = {"optim.accumulate": 2, "model.remat": "full"}
  if name == "train":
    assert {precision for _, precision in precisions(trace(name, **accumulated))} == {Precision.HIGHEST}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_products_of_a_bfloat16_program_have_the_default_precision(name):
  """Only the contrastive logits are float32 in every program, in the forward and in the backward pass."""
  counts = precisions(trace(name, **{"model.dtype": "bfloat16"}))
  exact = {key: counts.pop(key) for key in list(counts) if key[1] == Precision.HIGHEST}
  assert exact.keys() == ({("dot_general", Precision.HIGHEST)} if name == "train" else set())
  assert sum(exact.values()) <= 8 < sum(counts.values())
  assert {precision for _, precision in counts} == {Precision.DEFAULT}


def test_a_config_may_set_the_precision():
  network_with = lambda **changes: network_of(steps.make_config(**{f"model.{k}": v for k, v in changes.items()}))
  assert network_with(dtype="float32").matmul_precision == "highest"
  assert network_with(dtype="bfloat16").matmul_precision == "default"
  assert network_with(dtype="float32", matmul_precision="default").matmul_precision == "default"
  assert network_with(dtype="bfloat16", matmul_precision="high").matmul_precision == "high"
  counts = precisions(trace("discrimination", **{"model.matmul_precision": "high"}))
  assert {precision for _, precision in counts} == {Precision.HIGH}
