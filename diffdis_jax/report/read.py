"""Read what a run has left in its workdir, also while it runs."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, files, one_file
from diffdis_jax.errors import UserError
from diffdis_jax.report import curves
from diffdis_jax.run import provenance, workdir

ALIVE = 60.0  # seconds since the last sign of life of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A workdir, read.

  Attributes:
    name: of the folder, or more of its path where several runs are called the same.
    config: nested.
    curves: metric -> curve.
    grids: name -> [(step, file)] of pictures in samples/, by step.
    events: of history.jsonl.
    checkpoints: step -> what was measured when it was saved.
    results: what evaluate has left in the folder.
    cards: data source -> what prepare_data wrote of it: `facts` of card.json and the `picture` beside it.
    written: when metrics.jsonl was last written, seconds since 1970, as far as `provenance.reported` knows.
    alive: whether a process has the workdir now.
    restarted: whether that one has taken it after the last of `events`.
  """

  name: str
  config: dict[str, Any]
  curves: Mapping[str, curves.Curve]
  grids: Mapping[str, list[tuple[int, epath.Path]]]
  events: list[dict[str, Any]]
  checkpoints: Mapping[int, Mapping[str, float]]
  results: list[provenance.Result]
  cards: Mapping[str, dict[str, Any]]
  written: float | None
  alive: bool
  restarted: bool

  @property
  def step(self) -> int:
    """The last step that was reported, or else saved; 0 before the first."""
    return max((int(curve.steps[-1]) for curve in self.curves.values()), default=max(self.checkpoints, default=0))


def read(path: str, name: str) -> Run:
  """Read a workdir, and change nothing.

  Raises:
    UserError: no folder of a run.
  """
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
    cards=_cards(config["data"]),
    written=written,
    alive=taken is not None,
    restarted=taken is not None and bool(events) and taken > events[-1]["time"],
  )


def _grids(folder: epath.Path) -> dict[str, list[tuple[int, epath.Path]]]:
  found: dict[str, list[tuple[int, epath.Path]]] = {}
  for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
    if match := re.fullmatch(r"(.+)_(\d+)\.png", path.name):
      found.setdefault(match[1], []).append((int(match[2]), path))
  return {name: sorted(files, key=lambda each: each[0]) for name, files in found.items()}


def _checkpoints(path: str) -> dict[int, dict[str, float]]:
  if (file := one_file.at(path)) is not None:
    return {one_file.read_record(file).step: {}}
  folder = workdir.checkpoints(path)

  def measured(step: int) -> dict[str, float] | None:
    try:
      return workdir.metrics_of(folder, step)
    except (OSError, UserError):  # it was removed just now, or is damaged
      return None

  steps = workdir.committed_steps(folder)
  found = zip(steps, workdir.of_each(measured, steps), strict=True)
  return {step: metrics for step, metrics in found if metrics is not None}


def _cards(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Read the cards of the run's sources that prepare_data wrote, as far as they can be reached from here."""
  sections = data["mixture"] or {"data": data}
  found = {}
  for name, section in sections.items():
    path = str(section.get("path") or "").rstrip("/")
    facts = files.read_object(f"{path}/card.json") if path else {}
    if isinstance(facts.get("splits"), dict):  # else it is no card of ours
      picture = buckets.path(path) / "card.png"
      found[str(section["path"]) if name == "data" else name] = {"facts": facts, "picture": picture}
  return found


def _taken(lock: epath.Path) -> float | None:
  """Return when the process that holds the workdir now took it, in seconds since 1970; None if none does."""
  if not lock.exists() or time.time() - (beat := lock.stat().mtime) > ALIVE:
    return None
  taken = files.read_object(lock).get("time")
  return taken if isinstance(taken, float) else beat
