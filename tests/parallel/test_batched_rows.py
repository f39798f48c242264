from __future__ import annotations

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.parallel.batches import Batches
from tests import steps


class Rows:
  """Rows of an array that record which places were read, and by which threads."""

  def __init__(self, n: int, damaged: int = -1):
    self.damaged = damaged
    self.values = np.arange(n, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    self.asked: list[list[int]] = []
    self.threads: set[int] = set()

  def __len__(self) -> int:
    return len(self.values)

  def __getitem__(self, places: np.ndarray) -> np.ndarray:
    if self.damaged in places:
      raise UserError(f"record {self.damaged} cannot be used")
    self.asked.append(places.tolist())
    self.threads.add(threading.get_ident())
    return self.values[places]


def make(size: int = 4, after=lambda: None) -> Batches:
  return Batches(steps.make_mesh(), size, after)


@pytest.mark.parametrize("n", [1, 4, 5, 11])
def test_every_row_once_in_order_in_calls_of_one_shape(n):
  rows, shapes, ended = Rows(n), [], []
  doubled = make(after=lambda: ended.append(len(shapes)))(lambda x: shapes.append(x.shape) or 2 * x, rows)
  np.testing.assert_array_equal(doubled, 2 * rows.values)
  calls = -(-n // 4)
  assert shapes == [(4, 3)] * calls and ended == list(range(1, calls + 1))
  assert [place for places in rows.asked for place in places][:n] == list(range(n)) and len(rows.asked) == calls
  assert threading.get_ident() not in rows.threads


def test_an_error_of_reading_or_computing_ends_the_work():
  computed, rows = [], Rows(12)
  with pytest.raises(UserError, match="record 5"):
    make()(lambda x: computed.append(1) or x, Rows(12, damaged=5))
  assert len(computed) == 1
  with pytest.raises(ZeroDivisionError):
    make()(lambda x: 1 // 0, rows)
  assert len(rows.asked) == 2
  with pytest.raises(UserError, match="rows; give as many rows of each, and at least one"):
    make()(lambda x: x, Rows(0))
  with pytest.raises(UserError, match="arrays of 3, 5 rows; give as many rows of each"):
    make()(lambda x, y: x + y, jnp.zeros(3), jnp.zeros(5))
