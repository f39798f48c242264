"""Programs that several processes run together. All of them compile a program before any of them runs it.

Otherwise a process that finds its program in the compilation cache would wait in the first exchange for those that
still compile, and fail: Gloo waits 30 s, and so do the GPUs of one process for each other.
"""

from __future__ import annotations

import sys
import time
from concurrent import futures
from typing import Any

import jax
from absl import logging

from diffdis_jax.parallel import processes

TERMINAL_EVERY, LOG_EVERY = 4.0, 60.0  # seconds between two lines during a compilation


class AheadOfTime:
  """A traced program that a thread compiles while this one prepares the first call."""

  def __init__(self, name: str, lowered: jax.stages.Lowered):
    self._name, self._met, self._begin = name, False, time.monotonic()
    logging.info("compiling %s", name)
    # Not a daemon thread, which Python would end inside the compiler. common/cli.py finds it by name and never waits.
    thread = futures.ThreadPoolExecutor(1, thread_name_prefix="compiler")
    self._result = thread.submit(self._compile, lowered)
    thread.shutdown(wait=False)

  def compiled(self) -> jax.stages.Compiled:
    """Return the program once all processes have compiled it, and log meanwhile that it compiles. Raises the error of
    the compilation."""
    every = TERMINAL_EVERY if sys.stderr.isatty() else LOG_EVERY
    while futures.wait([self._result], timeout=every).not_done:
      logging.info("compiling %s, %.0f s so far", self._name, time.monotonic() - self._begin)
    program = self._result.result()
    if not self._met:
      processes.barrier(f"compiled {self._name}")
    self._met = True
    return program

  def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    program = lowered.compile()
    logging.info("compiled %s in %.1f s", self._name, time.monotonic() - self._begin)
    return program


class Program:
  """A jitted function, which is compiled at the first call with arguments of these shapes and shardings.

  All processes call it equally often, with arrays of the same shapes.
  """

  def __init__(self, name: str, f: Any):
    """Take `f`, a result of jax.jit, and a `name` for the log."""
    self.name, self._f = name, f
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def __call__(self, *args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    # The key has shardings, too: a compiled program refuses other ones, where jax.jit would compile again.
    key = tree, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    if key not in self._compiled:
      self._compiled[key] = AheadOfTime(self.name, self._f.lower(*args)).compiled()
    return self._compiled[key](*args)

  def trace(self, *args: Any) -> jax.stages.Traced:
    """Trace the function for these arguments or their shapes, without compiling it."""
    return self._f.trace(*args)
