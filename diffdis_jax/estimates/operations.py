"""Operations of a traced function: matrix products and convolutions, each turn of a loop counted.

XLA's own count takes a loop's body once, and adds what a layout pads and what rematerialisation repeats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count(jaxpr: core.ClosedJaxpr, *, turns: bool = True) -> float:
  """Floating-point operations, two for a multiply-add, over all devices.

  Args:
    turns: whether a loop counts as often as it turns, or once. A `while` whose turns are not known counts once.
  """
  return _of(jaxpr.jaxpr, turns)


def _of(jaxpr: core.Jaxpr, turns: bool) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total += _product(equation)
    elif name == "conv_general_dilated":
      total += _convolution(equation)
    elif name == "cond":
      total += max(_of(branch.jaxpr, turns) for branch in params["branches"])
    else:
      inner = sum(_of(inner, turns) for inner in _inner(params))
      total += inner * _repeats(name, params, turns)
  return total


def _product(equation: Any) -> float:
  (contracting, _), _ = equation.params["dimension_numbers"]
  lhs = equation.invars[0].aval.shape
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracting)


def _convolution(equation: Any) -> float:
  kernel = equation.invars[1].aval.shape
  outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
  taps = math.prod(kernel) / outputs
  # Of a dilated input, all but one in so many are zeros.
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps / math.prod(equation.params["lhs_dilation"])


def _repeats(name: str, params: dict[str, Any], turns: bool) -> float:
  if name == "scan":
    return params["length"] if turns else 1
  if name == "shard_map":
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  return 1


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for value in params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      each = getattr(each, "jaxpr", each)
      if isinstance(each, core.Jaxpr):
        yield each
