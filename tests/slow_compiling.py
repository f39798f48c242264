"""Run a module in several processes, one of which compiles a program slowly, as if the others had it in a cache:
python -m tests.slow_compiling diffdis_jax.train --config=... --workdir=..."""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
import time
from typing import Any

NAME, PROCESS, SECONDS = "DIFFDIS_TEST_SLOW_PROGRAM", "DIFFDIS_TEST_SLOW_PROCESS", "DIFFDIS_TEST_SLOW_SECONDS"
MESSAGE = "compiling slowly"


def variables(name: str, *, seconds: int, process: int = 0) -> dict[str, str]:
  """Return variables that make process number `process` take `seconds` longer to compile the program `name`."""
  return {NAME: name, PROCESS: str(process), SECONDS: str(seconds)}


class _Time(ctypes.Structure):
  _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _wait(seconds: int) -> None:
  """Wait on a lock, as a compiler does: other threads run, but Python's signal handlers do not."""
  lock, end = ctypes.create_string_buffer(64), _Time(int(time.time()) + seconds, 0)
  library = ctypes.CDLL(None)
  for _ in range(2):
    library.pthread_mutex_timedlock(lock, ctypes.byref(end))


def patch() -> None:
  """Make compiling slow if the environment asks for it."""
  from jax._src import compiler

  if os.environ.get("DIFFDIS_PROCESS_ID", "0") != os.environ.get(PROCESS):
    return
  compile_or_get_cached = compiler.compile_or_get_cached

  def slowly(backend: Any, computation: Any, *args: Any, **kwargs: Any) -> Any:
    if os.environ[NAME] in str(computation.operation.attributes["sym_name"]):
      sys.stderr.write(f"{MESSAGE}\n")
      sys.stderr.flush()
      _wait(int(os.environ[SECONDS]))
    return compile_or_get_cached(backend, computation, *args, **kwargs)

  compiler.compile_or_get_cached = slowly


if __name__ == "__main__":
  patch()
  del sys.argv[0]
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
