"""The charts of a report: which curves stand together, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diffdis_jax.report.curves import Curve

SPEED = {
  "images_per_sec": ("Images a second", "number"),
  "steps_per_sec": ("Steps a second", "number"),
  "data_wait": ("Time spent waiting for data", "share"),
  "hfu": ("Share of the chips' peak (HFU)", "share"),
  "slowest_host_data_wait": ("Time spent waiting for data, slowest host", "share"),
  "slowest_host": ("Slowest host, which waits longest for data", "number"),
}
OPTIMISATION = {
  "grad_norm": ("Norm of the gradient", "number"),
  "skipped": ("Steps skipped since the last report", "number"),
}
DATA = {"substituted": ("Records substituted since the last report", "number")}
_QUARTER = re.compile(r"(loss_\w+)_q([1-4])")


def distinct(curves: Mapping[str, Curve]) -> list[str]:
  """Leave out those metrics of an evaluation that are equal, at every step, to one before: with one template, the
  accuracy of all templates is that of the first."""
  kept: dict[str, Curve] = {}
  for name, curve in curves.items():
    # Within one data set alone: equal figures of two sets are two results.
    dataset = name.split("/")[0] if "/" in name else None
    others = (other for key, other in kept.items() if dataset and key.split("/")[0] == dataset)
    if not any(np.array_equal(curve.values, o.values) and np.array_equal(curve.steps, o.steps) for o in others):
      kept[name] = curve
  return list(kept)


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
  # By metric, so that several sets' accuracies share an axis; before speed, of which `rate/` looks alike.
  measured: dict[str, list[str]] = {}
  for name in left:
    if "/" in name and not name.startswith("rate/"):
      measured.setdefault(name.split("/", 1)[1], []).append(name)
  for metric, names in measured.items():
    take("evaluations", metric, names, [name.split("/")[0] for name in names])
  rates = [name for name in left if name.startswith("rate/")]
  for section, known in (("speed", SPEED), ("optimisation", OPTIMISATION), ("data", DATA)):
    for name, (title, format) in known.items():
      take(section, title, [name], [name], format)
  take("optimisation", "Learning rates", rates, [name.removeprefix("rate/") for name in rates])
  for name in list(left):
    take("losses", name.replace("_", " ").capitalize(), [name], [name])
  return charts
