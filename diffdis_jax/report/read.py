"""Read what a run has left in its workdir, also while it runs, and sum it up: how it stands, what it cost."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, files, one_file
from diffdis_jax.config.run import default_fields
from diffdis_jax.errors import UserError
from diffdis_jax.report import curves
from diffdis_jax.run import provenance, workdir

ALIVE = 60.0  # seconds since the last sign of life of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A workdir, read."""

  name: str  # of the folder, or more of its path where several runs are called the same
  config: dict[str, Any]  # nested
  curves: Mapping[str, curves.Curve]  # metric -> curve
  grids: Mapping[str, list[tuple[int, epath.Path]]]  # name -> [(step, file)] of pictures in samples/, by step
  events: list[dict[str, Any]]  # of history.jsonl
  checkpoints: Mapping[int, Mapping[str, float]]  # step -> what was measured when it was saved
  results: list[provenance.Result]  # what evaluate has left in the folder
  written: float | None  # when metrics.jsonl was last written, seconds since 1970, as far as it is known
  alive: bool  # whether a process has the workdir now
  restarted: bool  # whether that one has taken it after the last of `events`

  @property
  def step(self) -> int:
    """The last step that was reported, or else saved; 0 before the first."""
    return max((int(curve.steps[-1]) for curve in self.curves.values()), default=max(self.checkpoints, default=0))


def read(path: str, name: str) -> Run:
  """Read a workdir, and change nothing. Raises UserError: no folder of a run."""
  folder, config = buckets.path(path), run_config.load(path).to_dict()
  # A run writes while it is read: each file is whole or a line short, and they need not be of one moment.
  metrics = folder / "metrics.jsonl"
  written, events, taken = provenance.reported(path), provenance.read(path), _taken(folder / "lock.json")
  return Run(
    name=name,
    config=config,
    curves=curves.read(files.lines(metrics)),
    grids=_grids(folder / "samples"),
    events=events,
    checkpoints=_checkpoints(path),
    results=provenance.results(path),
    written=written,
    alive=taken is not None,
    restarted=taken is not None and bool(events) and taken > events[-1]["time"],
  )


def _grids(folder: epath.Path) -> dict[str, list[tuple[int, epath.Path]]]:
  pictures: dict[str, list[tuple[int, epath.Path]]] = {}
  for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
    if match := re.fullmatch(r"(.+)_(\d+)\.png", path.name):
      pictures.setdefault(match[1], []).append((int(match[2]), path))
  return {name: sorted(files, key=lambda pair: pair[0]) for name, files in pictures.items()}


def _checkpoints(path: str) -> dict[int, dict[str, float]]:
  if (file := one_file.at(path)) is not None:
    return {one_file.read_record(file).step: {}}
  folder = workdir.checkpoints(path)

  metrics = {}
  for step in workdir.committed_steps(folder):
    with contextlib.suppress(OSError, UserError):  # it was removed just now, or is damaged
      metrics[step] = workdir.metrics_of(folder, step)
  return metrics


def _taken(lock: epath.Path) -> float | None:
  """Return when the process that holds the workdir now took it, in seconds since 1970; None if none does."""
  if not lock.exists() or time.time() - (beat := lock.stat().mtime) > ALIVE:
    return None
  taken = files.read_object(lock).get("time")
  return taken if isinstance(taken, float) else beat


HOUR = 3600.0


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
  # A run in one file has no history.
  return {"state": "finished" if run.step >= run.config["num_steps"] else "unfinished", "message": ""}


def starts(run: Run, *, now: float) -> list[dict[str, Any]]:
  """List the starts: from which step and when, on what, for how many seconds (at least, of one that was killed), how
  each ended, and the steps after its last checkpoint that were taken again."""
  places = [i for i, event in enumerate(run.events) if event["event"] == "start"]
  listed = []
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
    listed.append(
      {
        **{name: start.get(name) for name in ("step", "time", "devices", "device_kind", "processes", "host", "jax")},
        "seconds": max(0.0, until - start["time"]) if until else _seconds_in_steps(run, start["step"], last),
        "how": how,
        "repeated": max(0, reached - next_start["step"]) if next_start else 0,
      }
    )
  return listed


def cost(run: Run, starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Add up device-hours by kind, and say where the time went, given what `starts` lists."""
  hours: dict[str, float] = {}
  for start in starts:
    kind = start["device_kind"] or "unknown"
    hours[kind] = hours.get(kind, 0.0) + start["seconds"] * (start["devices"] or 1) / HOUR
  return {
    "device_hours": hours,  # by kind: an hour of one is not an hour of another, and a run may have moved
    "seconds": sum(start["seconds"] for start in starts) if starts else None,
    "seconds_in_steps": _seconds_in_steps(run),
    "images": run.step * run.config["batch_size"],
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
