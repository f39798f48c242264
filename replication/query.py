"""Define arms of E10, which asks whether a network uses the noised text query e_t. None of them is in the paper."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffdis_jax.config.sections import NUM_TIMESTEPS
from diffdis_jax.data import records, sources
from diffdis_jax.method import schedules
from diffdis_jax.method.fusion import TextStream
from replication.scenes import in_runs

LATE = 900  # the first timestep of `scaled_linear` that the schedule `late` uses
LAST = NUM_TIMESTEPS - 1


class ConstantQuery(TextStream):
  """A text stream with a learned constant in the place of e_t: the network is a plain image encoder.

  The constant is the embedder's vector of the last timestep, which is free to be any vector. Neither e_t nor t_e is
  read.
  """

  def time_conditioned(self, e_t: Float[Array, "b d"], t_e: Int[Array, "b"]) -> Float[Array, "b d"]:
    """Return the constant, in the compute dtype."""
    del e_t
    return self.embedder(jnp.full_like(t_e, LAST))


def late_betas(n: int) -> Float[np.ndarray, "T"]:
  """Return the schedule with the noise levels of `scaled_linear` from LATE on, each repeated equally often."""
  alpha_bar = schedules.noise_schedule("scaled_linear").alpha_bar[LATE + np.arange(n) * (NUM_TIMESTEPS - LATE) // n]
  return 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])


@dataclasses.dataclass(frozen=True)
class TwoCaptions:
  """A data source that has each image twice in a row, with its first and with its last caption.

  A batch has both, so the image alone does not determine a row's caption, but e_t does.
  """

  source: Any

  @property
  def together(self) -> int:
    """Return the number of records that stay next to each other in training."""
    return 2 * getattr(self.source, "together", 1)

  def order(self, seed: int) -> grain.MapDataset:
    """Return the places of an epoch."""
    return in_runs(len(self), self.together, seed)

  def __len__(self) -> int:
    return 2 * len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.source[index // 2]
    caption = (records.captions_of(record) or (record["caption"],))[-(index % 2)]
    return {**record, "caption": caption, "captions": [caption]}


def twice(kind: type[sources.Section]) -> type[sources.Section]:
  """Return a kind of data source that gives each image of `kind` twice."""

  class Twice(kind):
    def open(self) -> sources.Source:
      return TwoCaptions(super().open())

  return Twice
