"""Count the operations of a traced function: matrix products and convolutions, at each turn of a loop.

XLA's own count takes a loop's body once, and adds what a layout pads and what rematerialisation repeats.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from diffdis_jax.common.params import Params
from diffdis_jax.inference import Inference
from diffdis_jax.models import remat
from diffdis_jax.training.step import Trainer, abstract_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A program that is traced, not compiled.

  Attributes:
    lower: what `targets.compile` takes.
    rows: images of one call.
    parameters: of the network.
    operations: of matrix products and convolutions, over all devices, with nothing computed twice.
  """

  lower: Callable[[], jax.stages.Lowered]
  rows: int
  parameters: int
  operations: float


def trace_train(trainer: Trainer) -> Program:
  """Trace the train step. Nothing is counted that is computed twice, and nothing is inside a kernel. A batch that is
  one whole in several microbatches is counted at once, without the pass that GradCache adds."""
  plain = copy.copy(trainer)
  plain.network = trainer.network.counted()
  if trainer.run.optim.contrastive_batch == "whole":
    plain.run = trainer.run.replace({"optim.accumulate": 1})
  with remat.keeping_all():
    counted = jax.jit(plain._train_step).trace(
      trainer.abstract_state, abstract_batch(trainer.run, trainer.network, trainer.mesh)
    )
  return _program(trainer.traced, trainer.run.batch_size, trainer.shapes, counted.jaxpr)


def trace_inference(name: str, inference: Inference) -> Program:
  """Trace one call of "generation" or "discrimination"; no operation that is counted is inside a kernel."""
  # The plain form is counted and the other is run: a kernel hides its products, and pads them.
  counted = Inference(
    inference.network.counted(), inference.sampling, mesh=inference.mesh, batch_size=inference.batch_size
  )
  return _program(inference.trace(name), inference.batch_size, inference.shapes, counted.trace(name).jaxpr)


def _program(traced: jax.stages.Traced, rows: int, shapes: Params, plain: core.ClosedJaxpr) -> Program:  # pyright: ignore[reportPrivateImportUsage]
  return Program(
    lower=traced.lower,
    rows=rows,
    parameters=sum(math.prod(leaf.shape) for leaf in shapes.values()),
    operations=count(plain),
  )


def count(jaxpr: core.ClosedJaxpr) -> float:  # pyright: ignore[reportPrivateImportUsage]
  """Count floating-point operations, two for a multiply-add, over all devices. A loop counts as often as it turns; a
  `while`, whose turns are not known, once."""
  return _of(jaxpr.jaxpr)


def _of(jaxpr: core.Jaxpr) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total += _product(equation)
    elif name == "conv_general_dilated":
      total += _convolution(equation)
    elif name == "cond":
      # One branch runs, and a trace does not say which.
      total += max(_of(branch.jaxpr) for branch in params["branches"])
    else:
      total += sum(map(_of, _inner(params))) * _repeats(name, params)
  return total


def _product(equation: Any) -> float:
  (contracting, _), _ = equation.params["dimension_numbers"]
  lhs = equation.invars[0].aval.shape
  # The output has the batch's axes and the free ones of both sides; the contracted ones are the sum's length.
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracting)


def _convolution(equation: Any) -> float:
  kernel = equation.invars[1].aval.shape
  outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
  # A kernel's input axis has the channels of one group, so that groups need no term of their own.
  taps = math.prod(kernel) / outputs
  # Of a dilated input, all but one in so many are zeros.
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps / math.prod(equation.params["lhs_dilation"])


def _repeats(name: str, params: dict[str, Any]) -> float:
  if name == "scan":
    return params["length"]
  # Its body is one device's.
  if name == "shard_map":
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
  return 1


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  # jit, scan, remat and derivatives of one's own each keep their body under another name, alone or among others.
  for value in params.values():
    for body in value if isinstance(value, (tuple, list)) else (value,):
      body = getattr(body, "jaxpr", body)  # out of a ClosedJaxpr
      if isinstance(body, core.Jaxpr):
        yield body
