"""Run a compiled function on any number of rows, in chunks of one shape that the processes share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes, sharding

ROWS = 64  # rows of a call on each chip
MOST_ROWS = 4096  # rows of a call: every device gets all results, and 16,384 images would fill its memory


def rows_of_a_call(mesh: Mesh) -> int:
  """Return 64 rows for each chip, up to MOST_ROWS, or 64 in all on CPUs, whose devices share the cores."""
  return ROWS if mesh.devices.flat[0].platform == "cpu" else min(ROWS * mesh.size, MOST_ROWS)


class Batches:
  """Run a compiled function on any number of rows, one call after another.

  Args:
    mesh: the devices that share the rows of a call.
    batch_size: rows of a call, rounded up to a multiple of the devices. None takes `rows_of_a_call`.
    after_batch: called after each call, on every process equally often. Its errors end the work.

  Attributes:
    size: rows of a call.
  """

  def __init__(self, mesh: Mesh, batch_size: int | None, after_batch: Callable[[], None]):
    self._mesh, self._after_batch = mesh, after_batch
    self.size = -(-(batch_size or rows_of_a_call(mesh)) // mesh.size) * mesh.size
    self._rows = np.array(sharding.local_rows(mesh, self.size))

  def __call__(
    self, f: Callable[..., jax.Array], *arrays: Any, done: Callable[[int], object] = lambda count: None
  ) -> np.ndarray:
    """Run f on the rows in chunks of one shape. The last chunk is padded by repeating its last row.

    Every process has the same arrays, reads its own rows of them, and gets the whole result. An array is any object
    with rows, which are read by another thread. `done` is called with the number of rows after each chunk.

    Raises:
      UserError: there are no rows, or the arrays have different numbers of rows.
    """
    lengths = [len(array) for array in arrays]
    n = lengths[0]
    if not n or {*lengths} != {n}:
      raise UserError(f"arrays of {', '.join(map(str, lengths))} rows; give as many rows of each, and at least one")

    def read(start: int) -> dict[str, Any]:
      rows = np.minimum(start + self._rows, n - 1)
      return {str(i): array[rows] for i, array in enumerate(arrays)}

    outputs: list[np.ndarray] = []
    pending: list[jax.Array] = []
    # Pad with an existing row and not with zeros, on which f might fail.
    # Arrays may decode images when rows are read, so read those of the next call while devices compute this one.
    with ThreadPoolExecutor(1) as reader:
      ahead = reader.submit(read, 0)
      for start in range(0, n, self.size):
        local = ahead.result()
        if start + self.size < n:
          ahead = reader.submit(read, start + self.size)
        pending.append(f(*sharding.to_global(local, self._mesh).values()))
        # The host fetches a result while the next call runs, so that devices never wait for it. It is not fetched
        # later, since the rows of all calls would then be on the devices at once.
        if len(pending) > 1:
          outputs.append(processes.whole(pending.pop(0)))
        done(min(self.size, n - start))
        self._after_batch()
      outputs.append(processes.whole(pending.pop()))
    return np.concatenate(outputs)[:n]
