"""What a step says of itself: sums and counts, whose ratio is a mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from jaxtyping import Array, Float

# name -> total and count: totals over samples, microbatches and steps add up, and their ratio is the mean.
Metrics = dict[str, Average]


def mean_of(per_sample: Float[Array, "b"]) -> Average:
  """A metric: the sum over samples, and their number."""
  return Average(total=jnp.sum(per_sample), count=jnp.asarray(len(per_sample), jnp.float32))


def write_totals(totals: Metrics | None) -> dict[str, list[float]]:
  """Metrics summed since the last report, as JSON, bit for bit."""
  # A double holds every f32, and JSON gives a double back as it was.
  return {name: [float(x.total), float(x.count)] for name, x in jax.device_get(totals or {}).items()}


def read_totals(meta: Mapping[str, Any]) -> Metrics | None:
  """The inverse of `write_totals`, so that a report over steps before and after a restart is that of one run."""
  saved = meta.get("totals") or {}
  return {
    name: Average(total=np.float32(total), count=np.float32(count)) for name, (total, count) in saved.items()
  } or None
