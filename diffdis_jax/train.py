"""Trains a config.

  python -m diffdis_jax.train --config=configs/NAME.py[:args] --workdir=DIR [--config.a.b=v ...] [--eval=JSON ...]

Run again with the same workdir, it goes on from the last checkpoint to the same numbers, on any number of processes and
devices. At SIGTERM it saves and exits with code 75, at Ctrl-C with code 130.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from diffdis_jax import config as run_config
from diffdis_jax.common import cli
from diffdis_jax.config import Run
from diffdis_jax.run import trackers

FLAGS = flags.FLAGS


def define_flags() -> None:
  """The command line."""
  cli.config_flag()
  cli.process_flags()
  flags.DEFINE_string("workdir", None, "folder of the run: created, or gone on with", required=True)
  flags.DEFINE_multi_string(
    "eval", [], 'one more evaluation while training, JSON: {"name": ..., "task": "zero_shot", "data": {"path": ...}}'
  )
  flags.DEFINE_enum("tracker", None, list(trackers.TRACKERS), "where numbers and images go beside TensorBoard")
  flags.DEFINE_string(
    "profile", None, "START:STEPS: write a trace of so many steps from START on, for xprof and Perfetto"
  )


def main(argv: Sequence[str]) -> None:
  del argv
  run = Run.of(run_config.with_evals(FLAGS.config, FLAGS.eval))
  trackers.check(FLAGS.tracker or "")

  # Not at the top: these take seconds, and what is wrong with the command line is said before.
  import jax

  from diffdis_jax.parallel import processes
  from diffdis_jax.training import loop

  cli.compilation_cache(FLAGS.workdir)
  cli.use_all_cores()  # before the first device is asked for, as must be processes.start
  jax.config.update("jax_numpy_dtype_promotion", "strict")  # bf16 with f32 by accident is an error
  processes.start()
  loop.train_and_evaluate(run, FLAGS.workdir, tracker=FLAGS.tracker or "", profiled=FLAGS.profile or "")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
