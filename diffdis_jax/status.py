"""Says how a run stands: state, step, pace, last checkpoint, cost, and why it ended.

  diffdis status runs/demo/diffdis --quiet

A workdir may lie in a bucket, and may be of a run on another machine. Nothing is changed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from diffdis_jax.report import read


def main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise UserError("write status RUN, the workdir of one run")
  path = argv[1].rstrip("/")
  cli.write("\n".join(lines(read.read(path, path), now=time.time())) + "\n")


def lines(run: read.Run, *, now: float) -> list[str]:
  """Say in four lines how a run stands. `now` is in seconds since 1970."""
  starts, status, num_steps = read.starts(run, now=now), read.status(run), run.config["num_steps"]
  step = f"step {run.step:,} of {num_steps:,}"
  speeds = run.curves["steps_per_sec"].values if "steps_per_sec" in run.curves else ()
  # NaN where a report is of the first step after a start alone, whose time is that of starting.
  if known := [speed for speed in speeds if speed > 0]:
    left = f", {duration(max(num_steps - run.step, 0) / known[-1])} left" if status["state"] == "running" else ""
    step += f", {known[-1]:.3g} steps/s{left}"
  if run.written is not None:
    step += f"; reported {duration(max(0.0, now - run.written))} ago"
  saved = f"last checkpoint: step {max(run.checkpoints):,}" if run.checkpoints else "no checkpoint yet"
  hours = ", ".join(f"{count:.2f} hours of {kind}" for kind, count in read.cost(run, starts)["device_hours"].items())
  state = ": ".join(filter(None, (status["state"], status["message"])))
  return [state, step, saved, f"{hours or 'no device-hours known'}; starts: {len(starts)}"]


def duration(seconds: float) -> str:
  """Say seconds in words: `80 seconds`, `12 minutes`, `2.5 hours`."""
  if seconds < 100:
    return f"{seconds:.0f} seconds"
  return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


if __name__ == "__main__":
  cli.run(main, positional=2)
