"""The curves of metrics.jsonl, thinned so that no spike is lost, and which of them stand together on a chart."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from diffdis_jax.run import provenance

BUCKETS = 400


@dataclasses.dataclass(frozen=True)
class Curve:
  """One metric over the steps of a run, as it was written. NaN where it was not finite."""

  steps: Int[np.ndarray, " n"]  # ascending
  values: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Band:
  """A curve in buckets. Each has the step of its last point, and mean, least and most of its finite values, or NaN."""

  steps: Int[np.ndarray, " k"]
  mean: Float[np.ndarray, " k"]
  least: Float[np.ndarray, " k"]
  most: Float[np.ndarray, " k"]


def read(lines: Sequence[str]) -> dict[str, Curve]:
  """Read the curves of metrics.jsonl, by metric.

  What is no number is left out, and so is a line that cannot be read, with a warning unless it is the last one, which
  may still be being written.
  """
  # Most lines have the metrics of the line before: one array for all of them.
  pieces: dict[str, list[Curve]] = {}
  for names, alike in itertools.groupby(filter(None, provenance.metrics_of(lines)), key=tuple):
    values = np.asarray([tuple(line.values()) for line in alike], np.float64)  # None, of what is not finite, is NaN
    steps = values[:, names.index("step")].astype(np.int64)
    for place, name in enumerate(names):
      if name != "step":
        pieces.setdefault(name, []).append(Curve(steps, values[:, place]))
  return {
    name: Curve(np.concatenate([piece.steps for piece in own]), np.concatenate([piece.values for piece in own]))
    for name, own in pieces.items()
  }


def thin(curve: Curve, buckets: int = BUCKETS) -> Band:
  """Put a curve into at most `buckets` buckets, equally many steps wide; one of fewer points stays as it is."""
  steps, values = curve.steps, curve.values
  if len(steps) <= buckets:
    return Band(steps, values, values, values)
  places = (steps - steps[0]) * buckets // (steps[-1] - steps[0] + 1)
  starts = np.flatnonzero(np.r_[True, np.diff(places) > 0])
  finite = np.isfinite(values)
  count = np.add.reduceat(finite.astype(np.int64), starts)

  def reduced(f: np.ufunc, empty: float) -> Float[np.ndarray, " k"]:
    """Reduce each bucket's finite values by f, in which `empty` changes nothing."""
    return np.where(count > 0, f.reduceat(np.where(finite, values, empty), starts), np.nan)

  # Least and most beside the mean, so that a spike of one step still shows.
  mean = reduced(np.add, 0.0) / np.maximum(count, 1)
  return Band(
    steps[np.r_[starts[1:] - 1, len(steps) - 1]], mean, reduced(np.minimum, np.inf), reduced(np.maximum, -np.inf)
  )


SPEED = {
  "images_per_sec": ("Images a second", "number"),
  "steps_per_sec": ("Steps a second", "number"),
  "data_wait": ("Time spent waiting for data", "share"),
}
OPTIMISATION = {
  "grad_norm": ("Norm of the gradient", "number"),
  "skipped": ("Steps skipped since the last report", "number"),
}
DATA = {"substituted": ("Records substituted since the last report", "number")}
_QUARTER = re.compile(r"(loss_\w+)_q([1-4])")


def group(metrics: Iterable[str]) -> list[dict[str, Any]]:
  """List the charts in order: `section`, `title`, `format` (number or share) and `series`, [metric, label]."""
  # Each metric is on one chart: what a chart takes is gone from here, and what is left at the end gets one of its own.
  left = dict.fromkeys(metrics)
  charts = []

  def take(section: str, title: str, names: Iterable[str], labels: Iterable[str], format: str = "number") -> None:
    series = [[name, label] for name, label in zip(names, labels) if name in left]
    for name, _ in series:
      del left[name]
    if series:
      charts.append({"section": section, "title": title, "format": format, "series": series})

  quartered: dict[str, list[str]] = {}
  for name in sorted(left):
    if match := _QUARTER.fullmatch(name):
      quartered.setdefault(match[1], []).append(name)
  for name in [name for name in left if name == "loss" or (name.startswith("loss_") and not _QUARTER.fullmatch(name))]:
    take("losses", "Loss" if name == "loss" else f"Loss, {name.removeprefix('loss_')}", [name], [name])
  for base, names in quartered.items():
    labels = [f"{name[-1]}/4 of the noise" if name[-1] != "4" else "4/4, the noisiest" for name in names]
    take("losses", f"Loss, {base.removeprefix('loss_')}, by quarter of the timestep", names, labels)
  # By metric, so that several sets' accuracies share an axis.
  measured: dict[str, list[str]] = {}
  for name in left:
    if "/" in name:
      measured.setdefault(name.split("/", 1)[1], []).append(name)
  for metric, names in measured.items():
    take("evaluations", metric, names, [name.split("/")[0] for name in names])
  for section, known in (("speed", SPEED), ("optimisation", OPTIMISATION), ("data", DATA)):
    for name, (title, format) in known.items():
      take(section, title, [name], [name], format)
  for name in list(left):
    take("losses", name.replace("_", " ").capitalize(), [name], [name])
  return charts
