"""The files of prepared data sets, the shards: copies of those in a bucket, an order of records that uses few shards of
a large set at a time, and a reader that keeps few of them open.

Records are read in random order, a few kB each, which a bucket answers in tens of milliseconds and a disk at once.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from diffdis_jax.common import buckets, files

AS_A_WHOLE = 2**22  # records of a set that is shuffled as a whole
WINDOW = 2**18  # records of a larger set that are shuffled with each other
_AT_ONCE = 8  # files that are copied or opened
_RECORDS = ".array_record"


def folder_of(path: str | os.PathLike[str], *, split: str | None = None) -> str:
  """Return the folder to read a data set from: its own, or for a bucket the copy in the user's cache directory, of its
  description and the records of `split`."""
  if not buckets.is_url(path):
    return os.fspath(path)
  return str(_copied(os.fspath(buckets.path(path)), split))  # with single slashes, as objects are named


class Copies:
  """Copies of the files of a data set in a bucket, which the processes of this machine share."""

  def __init__(self, url: str):
    self._url = url.rstrip("/")
    # A hash, since an address may be longer than a file's name.
    self.folder = pathlib.Path(files.user_cache("data"), hashlib.sha256(self._url.encode()).hexdigest()[:32])
    self.folder.mkdir(parents=True, exist_ok=True)

  def fetch(self, name: str) -> pathlib.Path:
    """Return the path of a file's copy, which is made if it is not there, or if the file has changed since."""
    copy, system, address = self.folder / name, buckets.checked(), f"{self._url}/{name}"
    facts, changed = system.info(address), system.modified(address).timestamp()
    with copy.with_name(f"{name}.lock").open("w") as lock:
      files.lock(lock, wait=True)
      if not copy.exists() or (copy.stat().st_size, copy.stat().st_mtime) != (facts["size"], changed):
        partial = copy.with_name(f"{name}.part")
        system.get_file(address, os.fspath(partial))
        os.utime(partial, (changed, changed))
        partial.replace(copy)
    return copy

  def drop(self, name: str) -> None:
    """Remove a copy. A process that still reads it keeps it open."""
    (self.folder / name).unlink(missing_ok=True)


@functools.cache
def _copied(url: str, split: str | None) -> pathlib.Path:
  there = {name: facts["size"] for name, facts in buckets.files_below(url).items()}
  wanted = [name for name in there if _RECORDS not in name or f"-{split}{_RECORDS}" in name]
  copies = Copies(url)
  if (size := sum(there[name] for name in wanted)) > 1e6:
    logging.info("reading %.2f GB of %s by copies in %s", size / 1e9, url, copies.folder)
  with ThreadPoolExecutor(_AT_ONCE) as pool:
    list(pool.map(copies.fetch, wanted))  # a list, which raises the first error
  return copies.folder


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
