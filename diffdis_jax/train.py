"""Train a config.

  diffdis train --config=shapes:autoencoder --workdir=runs/autoencoder

Run it again with the same --workdir to resume from the last checkpoint. The numbers are those of a run that was never
stopped; on another number of processes, devices or CPU cores they differ by rounding. SIGTERM saves and exits with code
75, Ctrl-C with code 130.

  --config=NAME[:argument=value,...]   the config, with arguments of its own
  --config.optim.accumulate=2          sets a field of the config
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax.common import cli
from diffdis_jax.run import watch, workdir, writers

FLAGS = flags.FLAGS
OF_CONFIG, FIRST = "config:", "first"  # what init_from begins with, and the folder in the workdir of what it trains


def define_flags() -> None:
  cli.config_flag()
  cli.process_flags()
  flags.DEFINE_string("workdir", None, "folder of the run; created, or resumed if it holds one", required=True)
  more = 'one more evaluation, as JSON: {"name": ..., "task": "zero_shot", "data": {"path": ...}}; may be repeated'
  flags.DEFINE_multi_string("eval", [], more)
  flags.DEFINE_enum("tracker", None, list(writers.TRACKERS), "where numbers and images are sent, beside TensorBoard")
  hangs = "seconds, compiling included, after which a step hangs and the process ends with code 1; 0 for never"
  flags.DEFINE_float("hang_timeout", watch.SECONDS, hangs, lower_bound=0.0)
  flags.DEFINE_string("profile", None, "START:STEPS: trace STEPS steps from step START, for xprof and Perfetto")


def main(argv: Sequence[str]) -> None:
  run, first = run_config.Run.of(run_config.with_evals(FLAGS.config, FLAGS.eval)), None
  if run.init_from.startswith(OF_CONFIG):
    first = run_config.Run.of(cli.read_config(run.init_from.removeprefix(OF_CONFIG), "config.init_from"))
    # Each says how long it takes after its first steps: before those nothing is known of this machine.
    steps = f"{first.num_steps:,} steps of {', '.join(first.objectives)} in {FLAGS.workdir}/{FIRST}"
    logging.info("first %s, then %s of %s", steps, f"{run.num_steps:,}", ", ".join(run.objectives))

  # Not at the top: these take seconds, and what is wrong with the command line is said before.
  import jax
  import numpy as np

  from diffdis_jax.parallel import processes
  from diffdis_jax.training import loop, run_info

  jax.config.update("jax_numpy_dtype_promotion", "strict")  # bf16 with f32 by accident is an error
  processes.start()
  how: dict[str, Any] = dict(tracker=FLAGS.tracker or "", hang_timeout=FLAGS.hang_timeout)
  if first:
    path = f"{FLAGS.workdir.rstrip('/')}/{FIRST}"
    # As process 0 sees it. A run that has begun needs it no more, and may have been moved since.
    if processes.from_first(np.uint8(workdir.latest_step(FLAGS.workdir) is not None)):
      path = run_config.read_fields(FLAGS.workdir)["init_from"]
    else:
      loop.train_and_evaluate(first, path, **how)
    run = run.replace({"init_from": path})
  loop.train_and_evaluate(run, FLAGS.workdir, profiled=FLAGS.profile or "", **how)
  if processes.is_first():
    run_info.log_end(run, FLAGS.workdir)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
