"""Programs that several processes run together: all of them have compiled one before any of them runs it.

Else a process that finds its program in the compilation cache runs ahead, waits in the first exchange for those that
still compile, and ends: Gloo waits 30 s, as do the GPUs of one process for each other (replication/log/preemption.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from concurrent import futures
from typing import Any

import jax
from absl import logging
from etils import epath

from diffdis_jax.common import buckets, files
from diffdis_jax.parallel import executables, processes

LONG = 2.0  # seconds: what took less the last time is not announced
_COMPILER = "compiler"  # how the names of threads begin that compile
_HIT = "/jax/compilation_cache/cache_hits"


class _Hits(threading.local):
  """How many programs this thread found in the compilation cache."""

  count = 0


_hits = _Hits()


def _count_hit(event: str, **_: Any) -> None:
  if event == _HIT:
    _hits.count += 1


jax.monitoring.register_event_listener(_count_hit)


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds that a program took the last time; None where it never did.

  Attributes:
    compiled: by the compiler.
    cached: out of the compilation cache.
  """

  compiled: float | None = None
  cached: float | None = None

  def __str__(self) -> str:
    parts = [f"{self.compiled:.1f} s"] if self.compiled is not None else []
    parts += [f"{self.cached:.1f} s from the cache"] if self.cached is not None else []
    return " or ".join(parts)


def compiled(name: str, f: Any, *args: Any) -> jax.stages.Compiled:
  """A jitted function for these arguments, once every process has compiled it. Logs how many seconds that took here,
  and before that, how many it took the last time, which is kept beside the compilation cache.

  Args:
    name: for the log, such as "the training step".
    f: what jax.jit returns.
    args: arrays, or shapes with shardings; nothing is run, and nothing donated.
  """
  return AheadOfTime(name, f, *args).compiled()


def is_compiling() -> bool:
  """Whether a thread compiles ahead, for which Python would wait at its end."""
  return any(thread.name.startswith(_COMPILER) for thread in threading.enumerate())


class AheadOfTime:
  """A jitted function that a thread compiles from shapes, while this one does what comes before the first call.

  Args:
    name, f, args: as of `compiled`.
    kept: where it may lie compiled, and is then neither traced nor compiled; None for nowhere.
  """

  def __init__(self, name: str, f: Any, *args: Any, kept: executables.Kept | None = None):
    self._name, self._f, self._args, self._kept = name, f, args, kept
    self._result: futures.Future[jax.stages.Compiled] | None = None
    self._compiled: jax.stages.Compiled | None = None

  def trace(self) -> jax.stages.Traced:
    """The function of these arguments, not compiled."""
    return self._f.trace(*self._args)

  def check(self) -> None:
    """Raises UserError where it should lie compiled in a folder, and another does."""
    if self._kept is not None:
      self._kept.check(self._name, self._args)

  def save(self, fresh: executables.Fresh | None = None) -> None:
    """Keeps it. `fresh`: the program, where it has been compiled. Raises UserError: it cannot be kept."""
    assert self._kept is not None
    file = self._kept.write(self._name, self._args, fresh or executables.compile(self._f.lower(*self._args)))
    logging.info("kept %s in %s", self._name, file)

  def start(self) -> None:
    """Begins, unless it has begun; several processes need not begin together."""
    if self._result is not None or self._compiled is not None:
      return
    # Not a daemon thread, which Python would end inside the compiler. common/cli.py waits for none.
    thread = futures.ThreadPoolExecutor(1, thread_name_prefix=_COMPILER)
    self._result = thread.submit(self._compile)
    thread.shutdown(wait=False)

  def compiled(self) -> jax.stages.Compiled:
    """The function, once every process has compiled it. Raises what compiling raised."""
    if self._compiled is None:
      program = self._result.result() if self._result else self._compile()
      processes.barrier(f"compiled {self._name}")
      self._compiled = program
    return self._compiled

  def _compile(self) -> jax.stages.Compiled:
    name, args, kept, begin = self._name, self._args, self._kept, time.monotonic()
    if kept is not None and (program := kept.read(name, args)) is not None:
      logging.info("loaded %s in %.1f s", name, time.monotonic() - begin)
      return program
    file = _times_file(name, args)
    last = _read(file)
    if last == Times():
      logging.info("compiling %s", name)
    elif max(last.compiled or 0.0, last.cached or 0.0) >= LONG:
      logging.info("compiling %s, which took %s the last time", name, last)
    begin, lowered = time.monotonic(), self._f.lower(*args)
    # By the thread's own count of hits, since other threads compile other programs at the same time.
    hits = _hits.count
    fresh = executables.compile(lowered)
    seconds, cached = time.monotonic() - begin, _hits.count > hits
    logging.info("compiled %s in %.1f s%s", name, seconds, " from the cache" if cached else "")
    if file is not None and processes.is_first():
      _write(file, dataclasses.replace(last, **{"cached" if cached else "compiled": seconds}))
    # Of CPUs each process keeps its own, and of others one does for all.
    if kept is not None and not kept.folder.given and (processes.is_first() or kept.devices[0].platform == "cpu"):
      kept.write(name, args, fresh)
    return fresh.program


def _times_file(name: str, args: Any) -> epath.Path | None:
  """Of this program, by its name, its arguments' shapes and the devices; None where nothing is kept."""
  folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if not folder:
    return None
  leaves, tree = jax.tree.flatten(args)
  shapes = [(x.shape, str(x.dtype)) for x in leaves]
  # What the compile time depends on, as far as it is known without lowering the program, which takes seconds itself.
  place = jax.__version__, jax.devices()[0].device_kind, jax.device_count(), jax.process_count()
  key = hashlib.sha256(repr((name, place, shapes, str(tree))).encode()).hexdigest()
  return buckets.path(folder) / "seconds" / f"{key[:32]}.json"


def _read(file: epath.Path | None) -> Times:
  try:
    return Times(**files.read_json(file)) if file is not None else Times()
  except Exception:
    # A file of another version, half of one, or a bucket's answer: nothing but a line of the log depends on it.
    return Times()


def _write(file: epath.Path, times: Times) -> None:
  """Where it can be written: jax itself warns of a cache that cannot."""
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(file, json.dumps(dataclasses.asdict(times)).encode())
  except Exception as error:
    logging.debug("no compile time kept: %s", error)


class Program:
  """A jitted function, `compiled` at its first call, and at the first with arguments of other shapes or places.

  Every process calls it equally often, with arrays of the same shapes.
  """

  def __init__(self, name: str, f: Any):
    """`f`: what jax.jit returns; `name`: for the log."""
    self.name, self._f = name, f
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def __call__(self, *args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    # Places too: the compiled program takes no array that lies elsewhere, where jax.jit would compile again by itself.
    key = tree, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    if key not in self._compiled:
      self._compiled[key] = compiled(self.name, self._f, *args)
    return self._compiled[key](*args)

  def trace(self, *args: Any) -> jax.stages.Traced:
    """The function of these arguments, or their shapes, not compiled."""
    return self._f.trace(*args)
