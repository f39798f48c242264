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
  found = facts(read.read(path, path), now=time.time())
  text = json.dumps(found) if FLAGS.json else "\n".join(lines(found))
  cli.write(f"{text}\n")


def facts(run: read.Run, *, now: float) -> dict[str, Any]:
  """Say how a run stands in JSON values; None for what is not known. `now` is in seconds since 1970.

  `steps_per_sec` is the last that is known, `age` the seconds since the last report, `starts` how often it was started.
  """
  made, num_steps = read.starts(run, now=now), run.config["num_steps"]
  pace = run.curves.get("steps_per_sec")
  # NaN where a report is of the first step after a start alone, whose time is that of starting.
  known = [] if pace is None else pace.values[pace.values > 0]
  rate = float(known[-1]) if len(known) else None
  return {
    **read.status(run),
    "step": run.step,
    "num_steps": num_steps,
    "steps_per_sec": rate,
    "seconds_left": None if rate is None else max(num_steps - run.step, 0) / rate,
    "age": None if run.written is None else max(0.0, now - run.written),
    "checkpoint": max(run.checkpoints, default=None),
    "device_hours": read.cost(run, made)["device_hours"],
    "starts": len(made),
  }


def duration(seconds: float) -> str:
  """Say seconds in words: `80 seconds`, `12 minutes`, `2.5 hours`."""
  if seconds < 100:
    return f"{seconds:.0f} seconds"
  return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def lines(found: dict[str, Any]) -> list[str]:
  """Put `facts` in words."""
  step = f"step {found['step']:,} of {found['num_steps']:,}"
  if found["steps_per_sec"] is not None:
    step += f", {found['steps_per_sec']:.3g} steps/s"
    step += f", {duration(found['seconds_left'])} left" if found["state"] == "running" else ""
  if found["age"] is not None:
    step += f"; reported {duration(found['age'])} ago"
  saved, hours = found["checkpoint"], [f"{hours:.2f} hours of {kind}" for kind, hours in found["device_hours"].items()]
  return [
    ": ".join(filter(None, (found["state"], found["message"]))),
    step,
    "no checkpoint yet" if saved is None else f"last checkpoint: step {saved:,}",
    f"{', '.join(hours) or 'no device-hours known'}; starts: {found['starts']}",
  ]


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=2)
