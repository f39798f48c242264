"""Two repairs of how jax writes its cache of compiled programs. What another version lacks stays as it is there."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from diffdis_jax.common import buckets, files


def repair_compilation_cache() -> None:
  """Entries come into the cache whole, and from every process that runs on CPUs."""
  _write_whole()
  _write_from_every_cpu_process()


def _write_whole() -> None:
  """jax writes an entry in its place (jax/_src/lru_cache.py). Another process may read a part of it, and a killed one
  leaves a part for good: then every later start warns, and compiles again.
  """
  from jax._src import lru_cache

  # Wrapped already, where a process asks for the cache a second time.
  put = getattr(lru_cache.LRUCache, "put", None)
  if put is None or hasattr(put, "__wrapped__"):
    return

  @functools.wraps(put)
  def put_whole(self: Any, key: str, value: bytes) -> None:
    if self.eviction_enabled or buckets.is_url(self.path):  # the former has a lock, the latter needs none
      return put(self, key, value)
    entry = pathlib.Path(self.path) / f"{key}-cache"
    if not entry.exists():
      files.write_whole(entry, value)
    return None

  lru_cache.LRUCache.put = put_whole


def _write_from_every_cpu_process() -> None:
  """Of several processes on CPUs, each keeps what it compiled. jax writes from process 0 alone (jax/_src/compiler.py,
  _cache_write), which serves the others on TPUs and GPUs, but not on CPUs: there a program's key differs between the
  processes (cache_key.py, _hash_accelerator_config), and all but process 0 would compile again at every start.
  """
  from jax._src import compiler, distributed

  write = getattr(compiler, "_cache_write", None)
  if write is None or hasattr(write, "__wrapped__"):
    return

  @functools.wraps(write)
  def from_this_process(key: str, seconds: float, name: str, backend: Any, *args: Any, **kwargs: Any) -> None:
    state = distributed.global_state
    if backend.platform != "cpu":
      return write(key, seconds, name, backend, *args, **kwargs)
    own, state.process_id = state.process_id, 0  # by which alone jax decides whether to write
    try:
      return write(key, seconds, name, backend, *args, **kwargs)
    finally:
      state.process_id = own

  compiler._cache_write = from_this_process
