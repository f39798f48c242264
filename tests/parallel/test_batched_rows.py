from __future__ import annotations

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.parallel.batches import Batches
from tests import steps


class Rows:
  """Rows of an array; remembers which were asked for, and by which thread."""

  def __init__(self, n: int):
    self.values = np.arange(n, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    self.asked: list[list[int]] = []
    self.threads: set[int] = set()
    self.second = threading.Event()

  def __len__(self) -> int:
    return len(self.values)

  def __getitem__(self, places: np.ndarray) -> np.ndarray:
    self.asked.append(places.tolist())
    self.threads.add(threading.get_ident())
    if len(self.asked) > 1:
      self.second.set()
    return self.values[places]


def make(size: int = 4, after=lambda: None) -> Batches:
  return Batches(steps.make_mesh(), size, after)


@pytest.mark.parametrize("n", [1, 4, 5, 11])
def test_every_row_once_in_order_in_calls_of_one_shape(n):
  rows, shapes, ended = Rows(n), [], []
  found = make(after=lambda: ended.append(len(shapes)))(lambda x: shapes.append(x.shape) or 2 * x, rows)
  np.testing.assert_array_equal(found, 2 * rows.values)
  calls = -(-n // 4)
  assert shapes == [(4, 3)] * calls and ended == list(range(1, calls + 1))
  assert [place for asked in rows.asked for place in asked][:n] == list(range(n)) and len(rows.asked) == calls
  assert threading.get_ident() not in rows.threads


def test_the_next_rows_are_read_while_these_are_computed():
  rows = Rows(8)

  def compute(x):
    assert rows.second.wait(60), "the second call's rows were not asked for during the first"
    return jnp.asarray(x)

  np.testing.assert_array_equal(make()(compute, rows), rows.values)


def test_what_reading_or_computing_raises_ends_the_work():
  class Damaged(Rows):
    def __getitem__(self, places):
      if 5 in places:
        raise UserError("record 5 cannot be used")
      return super().__getitem__(places)

  computed = []
  with pytest.raises(UserError, match="record 5"):
    make()(lambda x: computed.append(1) or x, Damaged(12))
  assert len(computed) == 1
  rows = Rows(12)
  with pytest.raises(ZeroDivisionError):
    make()(lambda x: 1 // 0, rows)
  assert len(rows.asked) == 2
  with pytest.raises(UserError, match="rows; give as many rows of each, and at least one"):
    make()(lambda x: x, Rows(0))


@pytest.mark.parametrize("n", [2, 5])
def test_arrays_of_other_numbers_of_rows_are_refused(n):
  """Jax takes the last row for one beyond the end, and rows beyond the first array's would be left out."""
  with pytest.raises(UserError, match=f"arrays of 3, {n} rows; give as many rows of each"):
    make()(lambda x, y: x + y, jnp.zeros(3), jnp.zeros(n))
