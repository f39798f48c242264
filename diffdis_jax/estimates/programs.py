"""A network's programs, lowered for a mesh from shapes alone: nothing is allocated and no data is read."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax.data.build import Data
from diffdis_jax.estimates import chips, operations
from diffdis_jax.inference import Inference
from diffdis_jax.models.build import Network
from diffdis_jax.parallel import sharding
from diffdis_jax.params import Params
from diffdis_jax.structs import Batch, LabelledBatch, LatentBatch, TrainingBatch
from diffdis_jax.training.build import build_step, plain
from diffdis_jax.training.step import Step

PROGRAMS = ("train", "generation", "discrimination")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One program, traced.

  Attributes:
    lower: what `targets.compile` takes.
    rows: images of one call.
    parameters: of the network.
    operations: of matrix products and convolutions, over all devices, with nothing computed twice.
    turns: the program's own operations over those with every loop's body counted once, as compilers do.
  """

  lower: Callable[[], jax.stages.Lowered]
  rows: int
  parameters: int
  operations: float
  turns: float


def abstract_batch(network: Network, data: Data, mesh: Mesh, batch_size: int) -> TrainingBatch:
  """Shapes of a global batch, of images or latents as the data section has it."""

  def rows(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh))

  tokens = rows(jnp.int32, data.max_length)
  if data.batch_type is LatentBatch:
    moments = rows(jnp.bfloat16, *network.latent_shape)
    return LatentBatch(mean=moments, log_variance=moments, tokens=tokens)
  image = rows(jnp.uint8, data.image_size, data.image_size, 3)
  if data.sampling is not None:
    return LabelledBatch(image=image, label=rows(jnp.int32), tokens=tokens if data.sampling.sentences else None)
  own_view = data.discrimination_augmentation is not None
  return Batch(image=image, tokens=tokens, discrimination_image=image if own_view else None)


def trace_train(step: Step, counted: Step, data: Data, *, batch_size: int) -> Program:
  """The train step. Operations are counted in `counted`, the same step in which nothing is computed twice and none of
  them is inside a kernel."""
  batch = abstract_batch(step.network, data, step.mesh, batch_size)
  traced, plain = (each.train_step.trace(each.abstract_state, batch) for each in (step, counted))
  return _program(traced, batch_size, step.shapes, plain.jaxpr)


def trace_inference(name: str, inference: Inference, counted: Inference) -> Program:
  """One call of "generation" or "discrimination"; operations are counted in `counted`, as of `trace_train`."""
  return _program(inference.trace(name), inference.batch_size, inference.shapes, counted.trace(name).jaxpr)


def rate_at_peak(config: ConfigDict, trainer: Step, data: Data) -> float | None:
  """Steps a second at the chips' peak in bf16, of which a run's MFU is a share; None on chips that are not known.

  By the operations of the step in which nothing is computed twice, as `preflight` counts them.
  """
  chip = chips.find(jax.devices()[0].device_kind)
  if chip is None:
    return None
  program = trace_train(trainer, build_step(plain(config), trainer.mesh), data, batch_size=config.batch_size)
  return chip.flops * trainer.mesh.size / program.operations


def _program(traced: jax.stages.Traced, rows: int, shapes: Params, plain: core.ClosedJaxpr) -> Program:
  own = functools.partial(operations.count, traced.jaxpr)
  return Program(
    lower=traced.lower,
    rows=rows,
    parameters=sum(math.prod(leaf.shape) for leaf in shapes.values()),
    operations=operations.count(plain),
    turns=own() / own(turns=False),
  )
