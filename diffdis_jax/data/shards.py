"""Data sets that are too large to be shuffled as a whole: an order that uses few of their files, the shards, at a time,
and a reader that keeps few of them open."""

from __future__ import annotations

import collections
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from diffdis_jax.data.copies import Copies

AS_A_WHOLE = 2**22  # records of a set that is shuffled as a whole
WINDOW = 2**18  # records of a larger set that are shuffled with each other
_AT_ONCE = 4  # shards that are fetched or opened


@runtime_checkable
class Sharded(Protocol):
  """A source that says how many of its records each shard holds, and opens shards ahead in the background."""

  lengths: list[int]

  def prefetch(self, shards: Iterable[int], /) -> None: ...


def is_large(lengths: Sequence[int]) -> bool:
  """Say whether a set with these numbers of records a shard is ordered by shards."""
  return sum(lengths) > AS_A_WHOLE


def group_size(lengths: Sequence[int]) -> int:
  """Return the number of shards whose records are shuffled with each other."""
  return max(1, round(WINDOW * len(lengths) / sum(lengths)))


class _Epoch(NamedTuple):
  """The groups of shards of an epoch, and by how many records each ends."""

  groups: list[list[int]]
  ends: Int[np.ndarray, " g"]


class Order:
  """An endless order of records: `order[i]` is the place of the i-th, from 0, the first record of the first shard.

  Each epoch shuffles the shards, takes them in groups, and shuffles the records of a group. So few shards are in use at
  a time, and each record comes once in an epoch. All of it is a function of (seed, i): batches do not depend on the
  number of hosts, and a resume is exact. `prefetch` gets the shards that come next, when those before them begin.
  """

  def __init__(self, lengths: Sequence[int], seed: int, prefetch: Callable[[Iterable[int]], None] | None = None):
    self._given, self._prefetch = (lengths, seed, prefetch), prefetch
    self._lengths, self._seed = np.asarray(lengths, np.int64), seed
    self._starts, self._group = np.cumsum(self._lengths) - self._lengths, group_size(lengths)
    # This epoch or group and the next: threads read ahead.
    self._epoch = functools.lru_cache(2)(self._epoch)
    self._shuffled = functools.lru_cache(2)(self._shuffled)

  def __reduce__(self) -> Any:
    return Order, self._given

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> int:
    epoch, place = divmod(index, int(self._lengths.sum()))
    ends = self._epoch(epoch).ends
    group = int(np.searchsorted(ends, place, side="right"))
    return int(self._shuffled(epoch, group)[place - ends[group]])  # counted from the group's end

  def _epoch(self, epoch: int) -> _Epoch:
    shards = np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths)).tolist()
    groups = [shards[start : start + self._group] for start in range(0, len(shards), self._group)]
    return _Epoch(groups, np.cumsum([self._lengths[group].sum() for group in groups]))

  def _shuffled(self, epoch: int, group: int) -> Int[np.ndarray, " n"]:
    groups = self._epoch(epoch).groups
    if self._prefetch:
      self._prefetch(groups[group + 1] if group + 1 < len(groups) else self._epoch(epoch + 1).groups[0])
    places = np.concatenate([self._starts[shard] + np.arange(int(self._lengths[shard])) for shard in groups[group]])
    return np.random.default_rng((self._seed, epoch, group)).permutation(places)


class Reader:
  """The stored records of shards, of which those that were used last are open. With `copies`, `files` are names in a
  bucket, which are fetched and dropped one by one."""

  def __init__(self, files: Sequence[str], lengths: Sequence[int], copies: Copies | None = None):
    self._given = (files, lengths, copies)
    self._files, self._copies, self._ends = files, copies, np.cumsum(lengths)
    # The group before, of which a thread may be late, this one and the next one.
    self._most_open = 3 * group_size(lengths) if is_large(lengths) else len(lengths)
    self._open: collections.OrderedDict[int, Future[ArrayRecordReader]] = collections.OrderedDict()
    self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(_AT_ONCE, "shards")

  def __reduce__(self) -> Any:
    return Reader, self._given

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, place: int) -> bytes:
    shard = self._shard_of(place)
    return self._opened(shard).result().read([place - int(self._ends[shard - 1] if shard else 0)])[0]

  def forget(self, place: int) -> None:
    """Open the shard of a record anew when it is read again."""
    with self._lock:
      self._open.pop(self._shard_of(place), None)

  def prefetch(self, shards: Iterable[int]) -> None:
    """Fetch shards that are read soon, in the background. An error is raised when they are read."""
    for shard in shards if self._copies else ():
      self._opened(shard)

  def _shard_of(self, place: int) -> int:
    return int(np.searchsorted(self._ends, place, side="right"))

  def _opened(self, shard: int) -> Future[ArrayRecordReader]:
    with self._lock:
      if shard not in self._open:
        self._open[shard] = self._pool.submit(self._read, shard)
      self._open.move_to_end(shard)
      while len(self._open) > self._most_open:
        last, _ = self._open.popitem(last=False)  # it closes when no thread reads from it
        if self._copies:
          self._copies.drop(self._files[last])
      return self._open[shard]

  def _read(self, shard: int) -> ArrayRecordReader:
    file = os.fspath(self._copies.fetch(self._files[shard])) if self._copies else self._files[shard]
    # Without reading ahead, since records are read in random order.
    return ArrayRecordReader(file, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
