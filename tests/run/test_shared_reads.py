from __future__ import annotations

import threading

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from diffdis_jax.parallel import processes
from diffdis_jax.run import shared_reads
from diffdis_jax.run.shared_reads import Part

COUNT, AT_ONCE = 4, 4 * 16  # processes, and bytes of all of them


def test_a_device_never_gets_more_than_some_bytes_however_many_processes_there_are(monkeypatch):
  """All processes' largest arrays at once would fill it. Each array arrives as it was, whatever its length."""
  lengths = (1, 3, 4, 5, 9, 17, 30)  # of f32: of one piece, of several, and of no whole number of them
  values = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in lengths]
  mine, meeting, board, largest = threading.local(), threading.Barrier(COUNT, timeout=30), {}, []

  def gathered(sent):
    board[mine.index] = sent.copy()
    meeting.wait()
    found = np.stack([board[i] for i in range(COUNT)])
    largest.append(found.nbytes)
    meeting.wait()
    return found

  monkeypatch.setattr(processes, "AT_ONCE", AT_ONCE)
  monkeypatch.setattr(jax, "process_count", lambda: COUNT)
  monkeypatch.setattr(jax, "process_index", lambda: mine.index)
  monkeypatch.setattr(processes, "gathered", gathered)
  place, results = SingleDeviceSharding(jax.local_devices()[0]), {}

  def one(index):
    mine.index = index
    owned = [(i % COUNT, value) for i, value in enumerate(values)]
    tree = [Part(owner, x.shape, x.dtype, place, x if owner == index else None) for owner, x in owned]
    results[index] = [np.asarray(each) for each in shared_reads.handed_out(tree)]

  threads = [threading.Thread(target=one, args=(index,)) for index in range(COUNT)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert largest and max(largest) <= AT_ONCE
  for index in range(COUNT):
    for found, value in zip(results[index], values, strict=True):
      np.testing.assert_array_equal(found, value)
