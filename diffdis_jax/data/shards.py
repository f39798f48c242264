"""Data sets that are too large to be shuffled as a whole: an order that uses few of their files, the shards, at a time,
and a reader that keeps few of them open.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from diffdis_jax.data.copies import ShardCopies

AS_A_WHOLE = 2**22  # records of a set that is shuffled as a whole
WINDOW = 2**20  # records of a larger set among which those of a batch are drawn
LANES = 32  # parts of a batch's rows, each with shards of its own, so that a host needs those of its rows alone
_AT_ONCE = 4  # shards that are fetched


@runtime_checkable
class Sharded(Protocol):
  """A source that says how many of its records each shard holds, and opens shards ahead in the background."""

  lengths: list[int]

  def prefetch(self, shards: Iterable[int], /) -> None: ...


def is_large(lengths: Sequence[int]) -> bool:
  """Say whether a set with these numbers of records a shard is ordered by shards."""
  return sum(lengths) > AS_A_WHOLE


def group_size(lengths: Sequence[int]) -> int:
  """Return the number of shards among whose records a lane's are drawn."""
  return max(1, round(WINDOW * len(lengths) / (LANES * sum(lengths))))


class _Dealt(NamedTuple):
  """The groups of shards that a lane takes in an epoch, and by how many records each ends."""

  groups: list[list[int]]
  ends: Int[np.ndarray, " g"]


class Order:
  """An endless order of records: `order[i]` is the place of the i-th, from 0, the first record of the first shard.

  The rows of a batch are parted into lanes. Each epoch shuffles the shards and deals them to the lanes. A lane takes
  its shards in groups, and shuffles the records of a group. So few shards are in use at a time, and each record comes
  once in an epoch. A lane begins its next epoch by itself, since lanes differ in their number of records.

  All of it is a function of (seed, i): batches do not depend on the number of hosts, and a resume is exact.

  Args:
    lengths: records of each shard.
    batch_size: rows of a batch, whose places in the order follow each other.
    seed: of the order.
    prefetch: gets the shards that a lane takes next, when it begins with those before them.
  """

  def __init__(
    self,
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    prefetch: Callable[[Iterable[int]], None] | None = None,
  ):
    self._given, self._prefetch = (lengths, batch_size, seed, prefetch), prefetch
    self._lengths = np.asarray(lengths, np.int64)
    self._starts = np.cumsum(self._lengths) - self._lengths
    self._batch_size, self._seed, self._group = batch_size, seed, group_size(lengths)
    self._lanes = math.gcd(batch_size, LANES)
    while self._lanes > len(lengths):
      self._lanes //= 2
    # Of each lane, where its epochs end, as far as that was asked for.
    self._epochs, self._lock = [[0] for _ in range(self._lanes)], threading.Lock()
    # Of each lane this epoch or group and the next: threads read ahead.
    self._deal = functools.lru_cache(2 * self._lanes)(self._deal)
    self._shuffle = functools.lru_cache(2 * self._lanes)(self._shuffle)

  def __reduce__(self) -> Any:
    return Order, self._given

  def __len__(self) -> int:
    return sys.maxsize // self._batch_size * self._batch_size

  def __getitem__(self, index: int) -> int:
    batch, row = divmod(index, self._batch_size)
    rows = self._batch_size // self._lanes
    lane, place = row // rows, batch * rows + row % rows
    with self._lock:
      ends = self._epochs[lane]
      while ends[-1] <= place:
        ends.append(ends[-1] + int(self._deal(lane, len(ends) - 1).ends[-1]))
      epoch = int(np.searchsorted(ends, place, side="right")) - 1
    place -= ends[epoch]
    group = int(np.searchsorted(self._deal(lane, epoch).ends, place, side="right"))
    records = self._shuffle(lane, epoch, group)
    return int(records[place - self._deal(lane, epoch).ends[group] + len(records)])

  def _deal(self, lane: int, epoch: int) -> _Dealt:
    shards = np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths)).tolist()
    # From another lane on in each epoch, so that those with one shard more are others.
    own = shards[(lane + epoch) % self._lanes :: self._lanes]
    groups = [own[start : start + self._group] for start in range(0, len(own), self._group)]
    return _Dealt(groups, np.cumsum([self._lengths[group].sum() for group in groups]))

  def _shuffle(self, lane: int, epoch: int, group: int) -> Int[np.ndarray, " n"]:
    groups = self._deal(lane, epoch).groups
    if self._prefetch:
      self._prefetch(groups[group + 1] if group + 1 < len(groups) else self._deal(lane, epoch + 1).groups[0])
    places = np.concatenate([self._starts[shard] + np.arange(int(self._lengths[shard])) for shard in groups[group]])
    return np.random.default_rng((self._seed, epoch, lane, group)).permutation(places)


class Reader:
  """The stored records of shards. Those that were used last are open.

  Args:
    files: the shards, local.
    lengths: records of each.
    copies: of shards in a bucket, which are fetched and dropped one by one; None where all are on this machine.
  """

  def __init__(self, files: Sequence[str], lengths: Sequence[int], copies: ShardCopies | None = None):
    self._given = (files, lengths, copies)
    self._files, self._copies, self._ends = files, copies, np.cumsum(lengths)
    # This group of each lane and the next one.
    self._most_open = 2 * LANES * group_size(lengths) if is_large(lengths) else len(lengths)
    self._open: collections.OrderedDict[int, Future[ArrayRecordReader]] = collections.OrderedDict()
    self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(_AT_ONCE, "shards")

  def __reduce__(self) -> Any:
    return Reader, self._given

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, place: int) -> bytes:
    shard = self.shard_of(place)
    return self._opened(shard).read([place - int(self._ends[shard - 1] if shard else 0)])[0]

  def shard_of(self, place: int) -> int:
    """Return the number of the shard of a record."""
    return int(np.searchsorted(self._ends, place, side="right"))

  def forget(self, place: int) -> None:
    """Open the shard of a record anew when it is read again."""
    with self._lock:
      self._open.pop(self.shard_of(place), None)

  def prefetch(self, shards: Iterable[int]) -> None:
    """Fetch shards that are read soon, in the background. An error is raised when they are read."""
    for shard in shards if self._copies else ():
      self._pool.submit(self._opened, int(shard))

  def _opened(self, shard: int) -> ArrayRecordReader:
    with self._lock:
      is_first = shard not in self._open
      opened = self._open.setdefault(shard, Future())
      self._open.move_to_end(shard)
      while len(self._open) > self._most_open:
        last, _ = self._open.popitem(last=False)  # it closes when no thread reads from it
        if self._copies:
          self._copies.drop(last)
    if is_first:
      try:
        opened.set_result(self._read(shard))
      except BaseException as error:
        with self._lock:
          self._open.pop(shard, None)
        opened.set_exception(error)
    return opened.result()

  def _read(self, shard: int) -> ArrayRecordReader:
    file = os.fspath(self._copies.fetch(shard)) if self._copies else self._files[shard]
    # Without reading ahead, since records are read in random order.
    return ArrayRecordReader(file, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
