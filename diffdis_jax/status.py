"""Says how a run stands: state, step, pace, last checkpoint, cost, and why it ended.

  diffdis status runs/demo/diffdis --nojson

A workdir may lie in a bucket, and may be of a run on another machine. --json writes the same as one JSON object.
Nothing is changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from diffdis_jax.report import read

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Define the command line."""
  flags.DEFINE_bool("json", False, "one JSON object instead of lines")


def main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise UserError(f"status {' '.join(argv[1:])}: write status RUN, the workdir of one run")
  path = argv[1].rstrip("/")
  known = facts(read.read(path, path), now=time.time())
  cli.write((json.dumps(known) if FLAGS.json else in_words(known)) + "\n")


def facts(run: read.Run, *, now: float) -> dict[str, Any]:
  """Say how a run stands in JSON values; None for what is not known. `now` is in seconds since 1970.

  `steps_per_sec` is the last that is known, `age` the seconds since the last report, `starts` how often it was started.
  """
  starts, num_steps = read.starts(run, now=now), run.config["num_steps"]
  speeds = run.curves["steps_per_sec"].values if "steps_per_sec" in run.curves else np.zeros(0)
  # NaN where a report is of the first step after a start alone, whose time is that of starting.
  rate = next((float(speed) for speed in speeds[::-1] if speed > 0), None)
  return {
    **read.status(run),
    "step": run.step,
    "num_steps": num_steps,
    "steps_per_sec": rate,
    "seconds_left": None if rate is None else max(num_steps - run.step, 0) / rate,
    "age": None if run.written is None else max(0.0, now - run.written),
    "checkpoint": max(run.checkpoints, default=None),
    "device_hours": read.cost(run, starts)["device_hours"],
    "starts": len(starts),
  }


def duration(seconds: float) -> str:
  """Say seconds in words: `80 seconds`, `12 minutes`, `2.5 hours`."""
  if seconds < 100:
    return f"{seconds:.0f} seconds"
  return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def in_words(known: dict[str, Any]) -> str:
  """Put `facts` in four lines."""
  step = f"step {known['step']:,} of {known['num_steps']:,}"
  if known["steps_per_sec"] is not None:
    step += f", {known['steps_per_sec']:.3g} steps/s"
    step += f", {duration(known['seconds_left'])} left" if known["state"] == "running" else ""
  if known["age"] is not None:
    step += f"; reported {duration(known['age'])} ago"
  saved = "no checkpoint yet" if known["checkpoint"] is None else f"last checkpoint: step {known['checkpoint']:,}"
  hours = ", ".join(f"{count:.2f} hours of {kind}" for kind, count in known["device_hours"].items())
  state = ": ".join(filter(None, (known["state"], known["message"])))
  return "\n".join((state, step, saved, f"{hours or 'no device-hours known'}; starts: {known['starts']}"))


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=2)
