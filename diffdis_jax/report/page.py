"""The page: everything as JSON inside a template that draws it. Nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import functools
import html
import importlib.resources
import io
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

import diffdis_jax
from diffdis_jax.data import image_files
from diffdis_jax.report import curves, read
from diffdis_jax.report.read import Run

DIGITS = 5  # of a number on a curve
MOST_GRIDS = 240  # of all runs
GRID_BYTES = 7_000_000  # of all of them, as text; the rest of a page's 10 MB is for curves
PLACE = re.compile(r"\{\{(\w+)\}\}")  # of the template


def render(runs: Sequence[Run], *, now: float | None = None) -> str:
  """Render one HTML page of a run, or of several to compare. `now` is in seconds since 1970; None for the present."""
  now = time.time() if now is None else now
  # Pillow works without Python's lock, so that curves are read while pictures are made.
  with concurrent.futures.ThreadPoolExecutor(1) as beside:
    embedded = beside.submit(embed, runs)
    data = data_of(runs, now=now)
  template = importlib.resources.files("diffdis_jax.report").joinpath("template.html").read_text(encoding="utf-8")
  # A folder's name may be no text of UTF-8.
  title = ", ".join(run.name for run in runs).encode(errors="replace").decode()
  texts = {"title": html.escape(title), "data": as_json(data), "pictures": as_json(embedded.result())}
  # All places at once: what a run says may look like one.
  return PLACE.sub(lambda place: texts[place[1]], template)


def data_of(runs: Sequence[Run], *, now: float) -> dict[str, Any]:
  """Collect all that the page shows except its pictures."""
  facts = [facts_of(run, now=now) for run in runs]
  metrics = dict.fromkeys(name for run in runs for name in run.curves)
  # Nearly always 0, and then a chart of nothing.
  if not any(np.nansum(run.curves["substituted"].values) for run in runs if "substituted" in run.curves):
    metrics.pop("substituted", None)
  return {
    "runs": facts,
    "charts": curves.group(metrics),
    "differences": differences(runs),
    "written": now,
    "version": diffdis_jax.__version__,
  }


def facts_of(run: Run, *, now: float) -> dict[str, Any]:
  """Collect what the page shows of one run, except its pictures."""
  starts = read.starts(run, now=now)
  return {
    "name": run.name,
    "status": read.status(run),
    "step": run.step,
    "num_steps": run.config["num_steps"],
    "batch_size": run.config["batch_size"],
    "objectives": run.config["objectives"],
    "written": run.written,
    "curves": {name: thinned(curve) for name, curve in run.curves.items()},
    "substituted": int(np.nansum(run.curves["substituted"].values)) if "substituted" in run.curves else 0,
    "starts": starts,
    "cost": read.cost(run, starts),
    "parameters": read.parameters(run),
    "rates": run.config["optim"]["rates"],
    "checkpoints": [{"step": step, "metrics": metrics} for step, metrics in sorted(run.checkpoints.items())],
    "results": [
      {"file": result.file, "task": result.task, "dataset": result.dataset, "metrics": result.record["metrics"]}
      for result in run.results
    ],
    "data": next((event["data"] for event in reversed(run.events) if "data" in event), []),
    "config": read.fields(run),
    "differing": read.differing(run),
  }


def thinned(curve: curves.Curve) -> dict[str, Any]:
  """Return a curve for the page, with `least` and `most` only where buckets hold more than one point."""
  band = curves.thin(curve)
  shown = {"steps": band.steps.tolist(), "mean": numbers(band.mean), "points": len(curve.steps)}
  shown["not_finite"] = int((~np.isfinite(curve.values)).sum())
  if len(band.steps) < len(curve.steps):
    shown |= {"least": numbers(band.least), "most": numbers(band.most)}
  finite = np.flatnonzero(np.isfinite(curve.values))
  if len(finite):
    values, steps = curve.values[finite], curve.steps[finite]
    for name, place in (("last", -1), ("lowest", values.argmin()), ("highest", values.argmax())):
      shown[name] = {"step": int(steps[place]), "value": float(f"{values[place]:.{DIGITS + 1}g}")}
  return shown


def numbers(values: np.ndarray) -> list[float | None]:
  return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """List the fields in which the runs differ, with their `values` as JSON; None where a run has no such field."""
  every = [read.fields(run) for run in runs]
  names = sorted({name for fields in every for name in fields})
  # As JSON, by which a tuple of one config and a list of another are equal.
  rows = [{"field": name, "values": [fields.get(name) for fields in every]} for name in names]
  return [row for row in rows if len(set(row["values"])) > 1]


def embed(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Return each run's pictures of its samples."""
  most = max(2, MOST_GRIDS // max(1, sum(len(run.grids) for run in runs)))
  kept = [{name: spread(files, most) for name, files in run.grids.items()} for run in runs]
  paths = [path for grids in kept for files in grids.values() for _, path in files]
  drawn = iter(embed_pictures(paths, most_bytes=GRID_BYTES))

  def shown(files: Sequence[tuple[int, Any]]) -> list[dict[str, Any]]:
    return [{"step": step, **vars(picture)} for step, _ in files if (picture := next(drawn))]

  return [
    {
      "grids": [{"name": name, "all": len(run.grids[name]), "grids": shown(files)} for name, files in grids.items()],
    }
    for run, grids in zip(runs, kept, strict=True)
  ]


def spread(files: Sequence[Any], most: int) -> list[Any]:
  """Choose at most so many of them, evenly apart, the last among them."""
  if len(files) <= most:
    return list(files)
  return [files[i] for i in np.unique(np.linspace(0, len(files) - 1, most).astype(int))]


def as_json(value: Any) -> str:
  """Write JSON that may stand inside a script element, whatever is in it. Numbers that are not finite are null."""
  # In ASCII, so that it holds neither a line's end of JavaScript nor half of a character.
  text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
  return text.replace("&", "\\u0026").replace("<", "\\u003c")


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def names_of(paths: Sequence[str]) -> list[str]:
  """Return the last part of each path, or as many parts as make the names different."""
  names, depth = paths, 0
  while depth == 0 or len(set(names)) < len(paths):
    depth += 1
    names = ["/".join(path.rstrip("/").split("/")[-depth:]) for path in paths]
  return [*names]


# Longest side, and quality of WebP, from the finest on.
SIZES = ((1600, 85), (1280, 80), (1024, 72), (832, 62), (704, 52), (576, 44), (448, 38), (352, 34), (256, 30))
MARGIN = 0.8  # of the bytes that there are, since the pictures differ


@dataclasses.dataclass(frozen=True)
class Picture:
  """WebP as a data URI, and its size in pixels."""

  uri: str
  width: int
  height: int


def embed_pictures(paths: Sequence[epath.Path], *, most_bytes: int) -> list[Picture | None]:
  """Return each file as a picture, all at one longest side and quality; None for a file that is no picture, or not yet.

  Args:
    most_bytes: of all data URIs together, judged by the last picture.
  """
  last = next((image for path in reversed(paths) if (image := _open(path))), None)
  if last is None:
    return [None] * len(paths)
  fits = lambda size: len(_shrink(last, *size).uri) * len(paths) < MARGIN * most_bytes
  side, quality = next(filter(fits, SIZES), SIZES[-1])
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(functools.partial(_embed, side=side, quality=quality), paths))


def _embed(path: epath.Path, *, side: int, quality: int) -> Picture | None:
  image = _open(path)
  return _shrink(image, side, quality) if image else None


def _open(path: epath.Path) -> Image.Image | None:
  try:
    with image_files.open_image(path.read_bytes()) as image:
      image.load()
      return image if image.mode == "RGB" else image.convert("RGB")
  except Exception:  # Pillow raises whatever it likes for a damaged file
    return None


def _shrink(image: Image.Image, side: int, quality: int) -> Picture:
  factor = min(1.0, side / max(image.size))
  width, height = (max(1, round(length * factor)) for length in image.size)
  image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=1.0)
  buffer = io.BytesIO()
  image.save(buffer, format="webp", quality=quality, method=1)
  return Picture(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size)
