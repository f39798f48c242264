"""Set up the tests: eight CPU devices, strict dtype promotion, warnings as errors, and checked annotations.

`make test` runs the tests marked neither `slow` nor `full`; CI those not marked `full`; `make test-all` all.
"""

import gc
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import signal
from collections.abc import Iterator

# Compilation takes most of the tests' time, and these flags more than halve it. jax reads them when it makes its first
# array, also in the commands that the tests start. A compiler that does not know a flag ends at once with a message.
# The second flag puts an AdamW step's moments, average and parameter into one kernel instead of four. The third is only
# for jaxlib 0.10: later versions have no other emitter.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"
  " --xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
  + " --xla_cpu_use_fusion_emitters=false"
  * importlib.metadata.version("jaxlib").startswith("0.10.")
).strip()

import jax
import jaxtyping
import pytest
from absl import logging as absl_logging

jaxtyping.install_import_hook("diffdis_jax", "tests.check")  # before any module of the package is imported
# nohup ignores this signal, and the commands that the tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Test files name these fixture files as plugins; pytest must know them before the first is imported.
pytest.register_assert_rewrite("tests.command_runs", "tests.pipelines", "tests.untrained", "tests.inception_weights")
pytest.register_assert_rewrite("tests.browser", "tests.bucket_server")

# Compiled programs are written at once to the user's cache, where the tests, their commands and later runs find them. A
# program compiled for one processor may not run on another, so the folder is named by its features.
_CPUINFO = pathlib.Path("/proc/cpuinfo")
_LINES = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
_FEATURES = sorted({line for line in _LINES if line.startswith(("flags", "Features", "model name"))})
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "diffdis_jax", "tests")
CACHE /= hashlib.sha256(repr(_FEATURES).encode()).hexdigest()[:16]
CACHED = {
  "jax_compilation_cache_dir": str(CACHE),
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_persistent_cache_enable_xla_caches": "none",  # they would put the folder's path into each key
}
for _name, _value in CACHED.items():
  jax.config.update(_name, _value)
  os.environ[_name.upper()] = str(_value)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)  # the compiler is faster without them

# Python's default garbage collection takes a tenth of the time, since jax's traces are millions of objects that stay.
gc.set_threshold(100_000, 50, 50)


PROCESS_BYTES = 5 * 2**30  # memory that one test process may take
CACHE_BYTES = 2 * 2**30  # limit for the compiled programs; one run of the tests needs a small part of it
# Limit on the CPU time of a case of `make test`, child processes included. CI sets its own limit.
MOST_SECONDS = float(os.environ.get("CASE_SECONDS", 20))


def pytest_sessionstart(session: pytest.Session) -> None:
  """Remove the oldest compiled programs beyond CACHE_BYTES, before the workers start."""
  if not hasattr(session.config, "workerinput"):
    size = 0
    for entry in sorted(CACHE.glob("*-cache"), key=lambda entry: -entry.stat().st_mtime):
      size += entry.stat().st_size
      if size > CACHE_BYTES:
        entry.unlink()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
  """Fail an unmarked case that takes longer than MOST_SECONDS. Runs shared by several cases do not count."""
  before = sum(os.times()[:4])
  result = yield
  seconds = sum(os.times()[:4]) - before
  longer = item.get_closest_marker("slow") or item.get_closest_marker("full")
  if seconds > MOST_SECONDS and not longer:
    pytest.fail(
      f"{seconds:.0f} s of CPU time; mark it slow, or make it take {MOST_SECONDS:.0f} s at most", pytrace=False
    )
  return result


@pytest.fixture(autouse=True)
def verbosity_stays() -> Iterator[None]:
  """Keep absl's verbosity, so that no test or command changes it for the next one."""
  logger = absl_logging.get_absl_logger()
  before = logger.level, logging.root.level
  yield
  logger.setLevel(before[0])
  logging.root.setLevel(before[1])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
  """Return one worker for each core if memory allows: jax keeps compiled and traced programs in memory."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return max(1, min(len(os.sched_getaffinity(0)), memory // PROCESS_BYTES))


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line("filterwarnings", "error")
  # jax compiles again if an entry is incomplete because another process writes it or was killed.
  config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")
  # flax's annotations cause this warning.
  config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")
