"""Everything that crosses a file border, and the one glossary of dimensions.

| letter | dimension |
|---|---|
| b | batch (global in the compiled step, per host in the loader) |
| n m | rows of any number, such as images, texts or records; a second number; tokens of an attention sequence |
| h w c | height, width, channels, of an image or of a latent |
| H W | height and width of an image beside a latent |
| k | classes; noise samples or candidates of a row; keys of a search |
| q | queries of a search |
| l | text tokens |
| d e | width of a stream, of a text embedding; of a second one beside it |
| s | sampling steps; side of a square; sentences of a class |
| T | timesteps of a noise schedule |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jaxtyping import BFloat16, Float, Int, UInt8

# A leaf is numpy's on a host, JAX's in the compiled step, as a type checker reads it, or a shape without an array.
if TYPE_CHECKING:
  AnyArray = jax.Array
else:
  AnyArray = jax.Array | np.ndarray | jax.ShapeDtypeStruct | jax.stages.ArgInfo


@struct.dataclass
class Batch:
  """One batch of captioned images. The loader gives numpy arrays per host, the step sees global arrays."""

  image: UInt8[AnyArray, "b h w 3"]
  tokens: Int[AnyArray, "b l"]
  discrimination_image: UInt8[AnyArray, "b h w 3"] | None = None  # where discrimination has a view of its own


@struct.dataclass
class LatentBatch:
  """One batch of captioned images as the autoencoder's posteriors over them, before shift and scale."""

  mean: BFloat16[AnyArray, "b h w c"]
  log_variance: BFloat16[AnyArray, "b h w c"]  # kept, so that each step samples the posterior again
  tokens: Int[AnyArray, "b l"]


@struct.dataclass
class LabelledBatch:
  """One batch of images with the number of their class, and a sentence of that class where one is sampled."""

  image: UInt8[AnyArray, "b h w 3"]
  label: Int[AnyArray, "b"]
  tokens: Int[AnyArray, "b l"] | None = None


# Each kind of batch is a type of its own, so that no field means one thing in one run and another in the next.
AnyBatch = Batch | LatentBatch
TrainingBatch = AnyBatch | LabelledBatch


@struct.dataclass
class TrainState:
  """The state that a training step changes, and what it reads beside the batch; or its shardings or shapes.

  `seed` and `skipped` are not saved. The seed is here so that runs of other seeds share the compiled step.
  """

  step: Any = None  # i32[], the number of finished steps; None where a checkpoint's folder says it
  params: dict[str, Any] = struct.field(default_factory=dict)  # flat (common/params.py), with the frozen ones
  ema: dict[str, Any] = struct.field(default_factory=dict)  # the averages of the trained ones; may be empty
  opt_state: Any = struct.field(default_factory=dict)
  seed: Any = None  # u32[], of all random choices
  teacher: dict[str, Any] = struct.field(
    default_factory=dict
  )  # the first trainable ones, where an objective keeps them
  skipped: Any = None  # i32[], how many of the last steps in a row were left out, as not finite


@struct.dataclass
class TextCondition:
  """The text encoder's outputs: c, the condition of every token, and e, the L2-normalised text query."""

  c: Float[AnyArray, "b l d"]
  e: Float[AnyArray, "b e"]


class Attended(NamedTuple):
  """Attention's result, and the logarithm of each softmax's denominator, f32; None where it was not asked for."""

  out: Float[AnyArray, "b n h d"]
  lse: Float[AnyArray, "b n h"] | None


@struct.dataclass
class Pairs:
  """The embeddings that CLIP's two towers give of a batch, each L2-normalised, f32."""

  image: Float[AnyArray, "b e"]
  text: Float[AnyArray, "b e"]


@struct.dataclass
class Posterior:
  """The autoencoder's Gaussian over latents, before shift and scale."""

  mean: Float[AnyArray, "b h w c"]
  log_variance: Float[AnyArray, "b h w c"]


# A struct for each pass, so that neither can be given the other's timestep or condition.
@struct.dataclass
class GenerationPass:
  """Arguments of Φ_u(z_t, t_z, c): noised latents, their timestep, the captions' condition."""

  z_t: Float[AnyArray, "b h w c"]
  t_z: Int[AnyArray, "b"]
  c: Float[AnyArray, "b l d"]


@struct.dataclass
class DiscriminationPass:
  """Arguments of Φ_θ(e_t, t_e, z): noised text query, its timestep, clean latents and theirs, the empty prompt's c."""

  e_t: Float[AnyArray, "b e"]
  t_e: Int[AnyArray, "b"]
  z: Float[AnyArray, "b h w c"]
  t_z: Int[AnyArray, "b"]  # one number for all rows, 1000 in the paper (Table 7); GenerationPass.t_z is sampled
  c_null: Float[AnyArray, "b l d"]
