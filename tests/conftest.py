"""Eight CPU devices, strict dtype promotion, warnings as errors, and every annotation of the package checked."""

import gc
import importlib.metadata
import logging
import os
import signal
from collections.abc import Iterator

# Most of the tests' time is the compiler's, and this more than halves it. Read when jax makes its first array, also by
# what the tests start. A compiler without one of these flags ends at once and says so.
# The last but one: an AdamW step's moments, average and parameter in one kernel instead of four. The last:
# of jaxlib 0.10 alone, after which there is no other emitter.
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

from tests import compiled
from tests.machine import memory
from tests.once import made_once

jaxtyping.install_import_hook("diffdis_jax", "tests.check")  # before any module of the package is imported
# Under nohup, the commands that the tests start would inherit that this signal is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The files of fixtures, which test files name as plugins, before one of them is imported.
pytest.register_assert_rewrite("tests.command_runs", "tests.pipelines", "tests.untrained", "tests.inception_weights")
pytest.register_assert_rewrite("tests.hub_server", "tests.bucket_server")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)  # of the compiler, again for its time

# Collecting as often as is customary takes a tenth of the time: what jax has traced is millions of objects, which stay.
gc.set_threshold(100_000, 50, 50)


# Files that take a minute or about as long. They come first, so that no process is left alone with one at the end. The
# first makes the runs that the third needs too, for which it would wait in the second's place.
LONGEST = (
  "test_bucket_runs.py",
  "test_sharding.py",
  "test_train.py",
  "test_preflight.py",
  "test_import_weights.py",
  "test_step.py",
  "test_demo.py",
  "test_pages.py",
  "test_ablate.py",
  "test_tour.py",
  "test_processes.py",
  "test_configs.py",
  "test_generation_accuracy.py",
  "test_requirements.py",
  "test_resume.py",
  "test_gradcache.py",
  "test_inference.py",
  "test_torch_pipeline.py",
  "test_evaluate_fid.py",
  # Half as long, but the last in the order of folders.
  "test_gradient_meter.py",
  "test_long_tail.py",
  "test_skips.py",
)


PROCESS_BYTES = 5 * 2**30  # of memory, that one process of the tests may take


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """What is compiled is found again: by the tests, by what they start, and by the next run of the tests."""
  folder = made_once(tmp_path_factory, "xla", compiled.restore)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they put the folder's path into each key
  yield
  compiled.keep(folder)


@pytest.fixture(autouse=True)
def verbosity_stays() -> Iterator[None]:
  """What a test, or a command in its process, sets of absl's log does not reach the next one's."""
  logger = absl_logging.get_absl_logger()
  before = logger.level, logging.root.level
  yield
  logger.setLevel(before[0])
  logging.root.setLevel(before[1])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
  """A process a core, while each has its memory: what jax has compiled and traced stays there."""
  from diffdis_jax.common.machine import cores  # only now, as in tests/machine.py

  return max(1, min(cores(), memory() // PROCESS_BYTES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line("filterwarnings", "error")
  # Of annotations that are flax's own.
  config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")
