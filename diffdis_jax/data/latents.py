"""The source `latents`: captions with an autoencoder's posteriors over several views of each image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, UInt16

from diffdis_jax.data import records
from diffdis_jax.errors import UserError


def is_finite(x: BFloat16[np.ndarray, "..."] | UInt16[np.ndarray, "..."]) -> bool:
  """Say whether all numbers, bf16 or its bits, are finite. An exponent of ones marks those that are not."""
  return not ((x.view(np.uint16) & 0x7F80) == 0x7F80).any()


class Latents:
  """Captions with the posteriors of their images' views, so many `views` of each, moments of `shape` [h, w, 2c].

  `source[i]` is the record of image i without moments; `read(i, k)` has those of its view k, too. `facts` are what
  data/prepare/latents.LatentStage.facts wrote, and `lengths` the images of each shard.
  """

  def __init__(self, stored: records.Pairs | records.Recaptioned, facts: Mapping[str, Any]):
    self._stored, self.facts = stored, facts
    self.views, self.shape = facts["views"], tuple(facts["shape"])
    # An image whose views lie in two shards counts for the first.
    ends = -(-np.cumsum(stored.lengths, dtype=np.int64) // self.views)
    self.lengths: list[int] = np.diff(ends, prepend=0).tolist()
    self.prefetch = stored.prefetch

  def __len__(self) -> int:
    return len(self._stored) // self.views

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self._stored[index * self.views]
    del record["moments"]
    return record

  def read(self, index: int, view: int) -> dict[str, Any]:
    """Read the record of a view, with its `moments`, bf16[h w 2c]. Raises records.Unusable."""
    record = self._stored[index * self.views + view]
    record["moments"] = record["moments"].view(ml_dtypes.bfloat16)
    if not is_finite(record["moments"]):
      raise records.Unusable(records.NOT_FINITE)
    return record


def open_latents(
  path: str | os.PathLike[str], *, split: str, num_images: int | None, caption_fields: Sequence[str] = ()
) -> Latents:
  """Open a split of a latent cache. Raises UserError: none there, no such split, or caption fields that its first
  record does not have."""
  facts = (records.read_info(path).metadata or {}).get("latents")
  if facts is None:
    raise UserError(f"{path} holds no latents; write them with diffdis prepare_data latents")
  # The views of an image are records of their own, side by side.
  number = num_images and num_images * facts["views"]
  stored = records.open_pairs(path, split=split, num_images=number, caption_fields=caption_fields)
  return Latents(stored, facts)
