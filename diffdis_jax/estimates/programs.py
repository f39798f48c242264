"""A config's programs, lowered for a mesh from shapes alone: nothing is allocated and no data is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax import batches, sharding
from diffdis_jax.estimates import operations
from diffdis_jax.inference import Inference
from diffdis_jax.models import build
from diffdis_jax.step import Step
from diffdis_jax.structs import AnyBatch, Batch, LatentBatch, UserError
from diffdis_jax.tree import Params

PROGRAMS = ("train", "generation", "discrimination")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One program, traced.

  Attributes:
    lower: what `targets.compile` takes.
    rows: images of one call.
    parameters: of the network.
    operations: of matrix products and convolutions, over all devices, with nothing rematerialised.
    turns: operations over operations with every loop's body counted once, as compilers do.
  """

  lower: Callable[[], jax.stages.Lowered]
  rows: int
  parameters: int
  operations: float
  turns: float


def make(name: str, config: ConfigDict, mesh: Mesh) -> Program:
  """Raises UserError for a config that the mesh cannot run or that lacks this program."""
  if name not in PROGRAMS:
    raise UserError(f"--programs has {name!r}; it is some of {','.join(PROGRAMS)}")
  return _train(config, mesh) if name == "train" else _inference(name, config, mesh)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> AnyBatch:
  """Shapes of a global batch, of images or latents as the config's data section has it."""
  rows = lambda dtype, *shape: jax.ShapeDtypeStruct(
    (config.batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh)
  )
  tokens = rows(jnp.int32, config.data.max_length)
  if batches.batch_type(config) is LatentBatch:
    side = config.image_size // build.latent_factor(config.model)
    moments = rows(jnp.bfloat16, side, side, config.model.autoencoder.latent_channels)
    return LatentBatch(mean=moments, log_variance=moments, tokens=tokens)
  image = rows(jnp.uint8, config.image_size, config.image_size, 3)
  own_view = config.data.discrimination_view == "own"
  return Batch(image=image, tokens=tokens, discrimination_image=image if own_view else None)


def _train(config: ConfigDict, mesh: Mesh) -> Program:
  step, batch = Step(config, mesh), abstract_batch(config, mesh)
  traced = once = step.train_step.trace(step.abstract_state, batch)
  if config.model.remat != "none":
    plain = ConfigDict(config).unlock()
    plain.model.remat = "none"
    once = Step(plain, mesh).train_step.trace(step.abstract_state, batch)
  return _program(traced.lower, config.batch_size, step.shapes, once.jaxpr)


def _inference(name: str, config: ConfigDict, mesh: Mesh) -> Program:
  if name not in config.objectives:
    raise UserError(f"--programs has {name}; this config's objectives are {', '.join(config.objectives)} alone")
  inference = Inference(config, mesh=mesh, batch_size=config.batch_size)
  traced = inference.trace(name)
  return _program(traced.lower, inference.batch_size, inference.shapes, traced.jaxpr)


def _program(lower: Callable[[], jax.stages.Lowered], rows: int, shapes: Params, jaxpr: core.ClosedJaxpr) -> Program:
  total = operations.count(jaxpr)
  return Program(
    lower=lower,
    rows=rows,
    parameters=sum(math.prod(leaf.shape) for leaf in shapes.values()),
    operations=total,
    turns=total / operations.count(jaxpr, turns=False),
  )
