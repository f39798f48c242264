"""Programs that several processes run together: all of them have compiled one before any of them runs it.

Else a process that finds its program in the compilation cache runs ahead, waits in the first exchange for those that
still compile, and ends: Gloo waits 30 s, as do the GPUs of one process for each other (docs/pods.md).
"""

from __future__ import annotations

import time
from typing import Any

import jax
from absl import logging

from diffdis_jax.parallel import processes


def compiled(name: str, f: Any, *args: Any) -> jax.stages.Compiled:
  """A jitted function for these arguments, once every process has compiled it. Logs how many seconds that took here.

  Args:
    name: for the log, such as "the training step".
    f: what jax.jit returns.
    args: arrays, or shapes with shardings; nothing is run, and nothing donated.
  """
  begin = time.monotonic()
  program = f.lower(*args).compile()
  logging.info("compiled %s in %.1f s", name, time.monotonic() - begin)
  processes.barrier(f"compiled {name}")
  return program


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
    key = tree, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    if key not in self._compiled:
      self._compiled[key] = compiled(self.name, self._f, *args)
    return self._compiled[key](*args)

  def trace(self, *args: Any) -> jax.stages.Traced:
    """The function of these arguments, or their shapes, not compiled."""
    return self._f.trace(*args)
