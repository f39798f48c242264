"""A compiled function over rows of any number: chunks of one shape, of which each process has its own rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes, sharding

ROWS = 64  # of a call, on each chip
MOST_ROWS = 4096  # of a call: every device gets all of its results, and 16,384 images would fill one


def rows_of_a_call(mesh: Mesh) -> int:
  """Return 64 for each chip, up to MOST_ROWS; on CPUs, whose devices share their cores, 64 in all."""
  return ROWS if mesh.devices.flat[0].platform == "cpu" else min(ROWS * mesh.size, MOST_ROWS)


class Batches:
  """Runs a compiled function over rows of any number, a call at a time.

  Args:
    mesh: devices that share the rows of a call.
    batch_size: rows a call; rounded up to a multiple of the devices. None takes `rows_of_a_call`.
    after_batch: called after each call, on every process equally often; what it raises ends the work.

  Attributes:
    size: rows a call.
  """

  def __init__(self, mesh: Mesh, batch_size: int | None, after_batch: Callable[[], None]):
    self._mesh, self._after_batch = mesh, after_batch
    self.size = -(-(batch_size or rows_of_a_call(mesh)) // mesh.size) * mesh.size
    self._rows = np.array(sharding.local_rows(mesh, self.size))

  def __call__(
    self, f: Callable[..., jax.Array], *arrays: Any, done: Callable[[int], object] = lambda count: None
  ) -> np.ndarray:
    """Run f over the rows in chunks of one shape, the last one padded by repeating its last row.

    Every process has the same arrays, of which it takes its own rows, and gets the whole result. An array is anything
    that gives rows; another thread asks it for them. `done` is called with the number of rows after each chunk.

    Raises:
      UserError: no row, or arrays of different numbers of rows.
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
    # Padded by a row that is there, not by zeros, so that f sees nothing that it could fail on.
    # Arrays may decode images when rows are asked for: those of the next call, while devices compute this one's.
    with ThreadPoolExecutor(1) as reader:
      ahead = reader.submit(read, 0)
      for start in range(0, n, self.size):
        local = ahead.result()
        if start + self.size < n:
          ahead = reader.submit(read, start + self.size)
        pending.append(f(*sharding.to_global(local, self._mesh).values()))
        # The host fetches a result when the next call is under way, so that devices never wait for it; and no later,
        # or else all calls' rows would lie on the devices together.
        if len(pending) > 1:
          outputs.append(processes.whole(pending.pop(0)))
        done(min(self.size, n - start))
        self._after_batch()
      outputs.append(processes.whole(pending.pop()))
    return np.concatenate(outputs)[:n]
