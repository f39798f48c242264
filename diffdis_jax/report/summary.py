"""The facts of a run beside its curves in a report: how it stands, what it cost, its learning rates and config."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffdis_jax.config.run import default_fields
from diffdis_jax.config.section import read_section
from diffdis_jax.config.sections import Optim
from diffdis_jax.report.curves import Curve
from diffdis_jax.report.read import Run
from diffdis_jax.run import workdir

HOUR = 3600.0
RATE_POINTS = 400


def status(run: Run) -> dict[str, str]:
  """Return `state`, one of running, finished, stopped, failed, killed, unfinished, and `message` of what failed."""
  last = run.events[-1] if run.events else {}
  # One that was started again may read its checkpoint and compile for long before it says so.
  if last.get("event") == "end" and not run.restarted:
    return {"state": last["why"], "message": last.get("message", "")}
  if run.alive:
    return {"state": "running", "message": ""}
  if last:
    return {"state": "killed", "message": ""}
  # The run is from before there was a history.
  return {"state": "finished" if run.step >= run.config["num_steps"] else "unfinished", "message": ""}


def starts(run: Run, *, now: float) -> list[dict[str, Any]]:
  """List the starts: from which step and when, on what, for how many seconds (at least, of one that was killed), how
  each ended, and the steps after its last checkpoint that were taken again."""
  places = [i for i, event in enumerate(run.events) if event["event"] == "start"]
  found = []
  for place, after in itertools.pairwise([*places, len(run.events)]):
    start, ends = run.events[place], run.events[place + 1 : after]
    next_start = run.events[after] if after < len(run.events) else None
    if ends:
      until, how = ends[-1]["time"], ends[-1]["why"]
    elif next_start:
      until, how = next_start.get("until"), "killed"
    else:
      until, how = (now, "running") if run.alive else (run.written, "killed")
    reached, last = (next_start or {}).get("reached", start["step"]), (next_start or {}).get("step", math.inf)
    found.append(
      {
        **{name: start.get(name) for name in ("step", "time", "devices", "device_kind", "processes", "host", "jax")},
        "seconds": max(0.0, until - start["time"]) if until else _seconds_in_steps(run, start["step"], last),
        "how": how,
        "repeated": max(0, reached - next_start["step"]) if next_start else 0,
      }
    )
  return found


def cost(run: Run, made: Sequence[Mapping[str, Any]], *, hour_price: float | None) -> dict[str, Any]:
  """Add up device-hours by kind, and say where the time went.

  Args:
    made: of `starts`.
    hour_price: of one device for an hour, in whatever money; None where it is not known.
  """
  hours: dict[str, float] = {}
  for start in made:
    kind = start["device_kind"] or "unknown"
    hours[kind] = hours.get(kind, 0.0) + start["seconds"] * (start["devices"] or 1) / HOUR
  return {
    "device_hours": hours,  # by kind: an hour of one is not an hour of another, and a run may have moved
    "seconds": sum(start["seconds"] for start in made) if made else None,
    "seconds_in_steps": _seconds_in_steps(run),
    "images": run.step * run.config["batch_size"],
    "price": None if hour_price is None else hour_price * sum(hours.values()),
  }


def _seconds_in_steps(run: Run, first: float = 0, last: float = math.inf) -> float:
  """Add up the time of the steps after `first`, up to `last`, whose speed was reported."""
  if "steps_per_sec" not in run.curves:
    return 0.0
  curve = run.curves["steps_per_sec"]
  # A speed is that of the steps since the report before it.
  counts = np.diff(np.r_[0, curve.steps])
  counted = np.isfinite(curve.values) & (curve.values > 0) & (curve.steps > first) & (curve.steps <= last)
  return float((counts[counted] / curve.values[counted]).sum())


def learning_rates(run: Run) -> dict[str, Curve]:
  """Return `rate/GROUP` of each group that is trained, at the steps so far, as the config's schedule has it."""
  from diffdis_jax.training import optim  # jax takes two seconds, in which the pictures are made

  if not run.step:
    return {}
  section = read_section(Optim, run.config["optim"], "optim")
  steps = np.unique(np.linspace(1, run.step, RATE_POINTS).astype(int))
  lengths = [(event["step"], event["num_steps"]) for event in run.events if event.get("num_steps")]
  found, trained = {}, parameters(run)
  for group in section.rates:
    if trained and group not in trained:
      continue
    rates = np.empty(len(steps), np.float64)
    # A run that was made longer has the schedule of its length at each start.
    for first, num_steps in [(0, run.config["num_steps"]), *lengths]:
      schedule = optim.rate_schedule(section, group, num_steps=num_steps)
      # The first step is taken at the schedule's 0.
      rates = np.where(steps > first, np.asarray(schedule(np.asarray(steps - 1, np.float32)), np.float64), rates)
    found[f"rate/{group}"] = Curve(steps, np.broadcast_to(rates, steps.shape))
  return found


def parameters(run: Run) -> dict[str, dict[str, int]]:
  """Return numbers of parameters by group and part of the network, as the last start recorded them."""
  return next((event["parameters"] for event in reversed(run.events) if "parameters" in event), {})


def fields(run: Run) -> dict[str, str]:
  """Write every field of the config as JSON, by its dotted name."""
  return {name: json.dumps(value) for name, value in workdir.flatten(run.config).items()}


def differing(run: Run) -> list[str]:
  """List the fields that differ from the default that every config has."""
  defaults = workdir.flatten(default_fields())
  own = fields(run)
  return [name for name, value in defaults.items() if name in own and own[name] != json.dumps(value)]
