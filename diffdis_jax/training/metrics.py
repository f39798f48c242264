"""What a step says of itself: sums and counts, whose ratio is a mean."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffdis_jax.structs import AnyArray

# name -> (sum, count): sums over samples, microbatches and steps add up, and their ratio is the mean.
Number = np.floating | Float[AnyArray, "..."]
Metrics = dict[str, tuple[Number, Number]]


def mean_of(per_sample: Float[Array, "b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """A metric: the sum over samples, and their number."""
  return jnp.sum(per_sample), jnp.asarray(len(per_sample), jnp.float32)
