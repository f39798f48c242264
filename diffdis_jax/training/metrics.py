"""What a step says of itself: sums and counts, whose ratio is a mean."""

from __future__ import annotations

import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Float

# name -> total and count: totals over samples, microbatches and steps add up, and their ratio is the mean.
Metrics = dict[str, Average]


def mean_of(per_sample: Float[Array, "b"]) -> Average:
  """A metric: the sum over samples, and their number."""
  return Average(total=jnp.sum(per_sample), count=jnp.asarray(len(per_sample), jnp.float32))
