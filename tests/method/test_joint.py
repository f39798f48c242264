"""Test the joint batch of two batches, and the fusion block on one of its parts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from diffdis_jax.method import joint


def test_pairs_keep_the_rows_of_each_part_together():
  first, second = jnp.arange(12).reshape(6, 2), 100 + jnp.arange(12).reshape(6, 2)
  joined = joint.pair(first, second, 3)
  assert joined[:, 0].tolist() == [0, 2, 100, 102, 4, 6, 104, 106, 8, 10, 108, 110]
  for part, expected in zip(joint.unpair(joined, 3), (first, second), strict=True):
    np.testing.assert_array_equal(part, expected)
