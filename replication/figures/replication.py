"""Draw the figures of replication/index.md, where replication/measured/replication.json has experiments."""

from __future__ import annotations

import functools
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from replication.figures import plots
from replication.figures.style import SMALL, Axes, Canvas, Palette, Scale
from replication.measured import replication

LEFT, RIGHT = 12, 708  # of the forest's scale
TIMED = ("e1", "e2", "e4", "e8")  # which have arms of equal minutes; the arms of the others take as long as each other


def figures(found: Mapping[str, Any]) -> dict[str, Callable[[Palette], str]]:
  """Return name -> what draws it. `found` is as `replication.stored` gives it."""
  if not replication.has_verdicts(found):
    return {}
  return {
    "replication_forest": functools.partial(forest, found=found),
    "replication_minutes": functools.partial(minutes, found=found),
  }


def forest(palette: Palette, *, found: Mapping[str, Any]) -> str:
  """Plot every primary comparison with its 95 % interval, and the bound of no effect as a band."""
  compared = [
    (name, claim) for name in replication.QUESTIONS for claim in found["claims"].get(name, ()) if claim["verdict"]
  ]
  differences = [claim["verdict"]["difference"] for _, claim in compared]
  sides = [abs(end) for difference in differences for end in plots.ends(difference)]
  far = plots.reach(max((*sides, *(claim["bound"] for _, claim in compared))))
  scale = Scale(-far, far, LEFT, RIGHT)
  canvas, body, y, last = Canvas(palette), Canvas(palette), 10.0, ""
  for (name, claim), difference in zip(compared, differences, strict=True):
    if name != last:
      y += 46 if last else 26
      body.label(4, y, f"{name.upper()}: {replication.QUESTIONS[name]}")
      last = name
    y += 8
    figure = replication.title(found, name, claim["row"], claim["column"]).translate(_ARROWS)
    for line in textwrap.wrap(f"{claim['row']} − {claim['base']}, {figure}", 60):
      y += 26
      body.label(4, y, line, colour=palette.soft)
    y += 24
    bound = claim["bound"]
    canvas.fill(scale(-bound), y - 11, scale(bound) - scale(-bound), 22, palette.off, opacity=0.6)
    plots.interval(body, scale, y, difference)
  bottom = y + 16
  canvas.line([(scale(0), 10), (scale(0), bottom)], palette.off, width=2)
  for tick in (scale.low, 0, scale.high):
    anchor = "start" if tick < 0 else "end" if tick > 0 else "middle"
    words = f"{tick:+g}".replace("-", "−") if tick else "0"
    canvas.text(scale(tick), bottom + 26, words, size=SMALL, colour=palette.soft, anchor=anchor)
  canvas.parts += body.parts
  plots.legend(canvas, bottom + 62, [("not significant", palette.soft), ("significant (Holm)", palette.text)])
  canvas.text(canvas.width - 4, bottom + 62, "points, 95 % intervals", size=SMALL, anchor="end", colour=palette.soft)
  canvas.text(4, bottom + 92, "band: the bound of no effect", size=SMALL, anchor="start", colour=palette.soft)
  title = f"Primary comparisons of the replication: {len(compared)} paired differences with 95 % intervals over seeds."
  return canvas.svg(bottom + 106, title)


_ARROWS = str.maketrans({"↑": "", "↓": ""})


def minutes(palette: Palette, *, found: Mapping[str, Any]) -> str:
  """Plot the figures that are compared, over minutes of training; a dot a seed, a number an arm."""
  known = [arm for arm in replication.measured(found) if arm.minutes is not None and arm.experiment in TIMED]
  canvas, y = Canvas(palette), 0.0
  for (name, column), group in itertools.groupby(
    sorted(known, key=lambda arm: (arm.experiment, arm.column)), lambda arm: (arm.experiment, arm.column)
  ):
    y = _panel(canvas, y, name, column, [*group])
  title = "Replication: the figures that are compared over minutes of training, by experiment and arm; a dot is a seed."
  return canvas.svg(y + 10, title)


def _panel(canvas: Canvas, top: float, name: str, column: str, arms: list[replication.Arm]) -> float:
  """Draw one figure of an experiment, and return its lower end."""
  palette = canvas.palette
  # A split's name says again what is measured: test_unseen_generated is generated images of unseen pairs.
  figure = re.sub(r"\b(test|val)_(\w+?)(_generated)?\b(?=[, ])", r"\2", arms[0].title.translate(_ARROWS))
  title = f"{name.upper()}: {figure.strip()}, %"
  canvas.text(4, top + 26, title, size=SMALL, anchor="start")
  values = [value for arm in arms for value in arm.values]
  low, high = 5 * (min(values) // 5), 5 * -(-max(values) // 5)
  high = max(high, low + 5)
  last = plots.reach(max(arm.minutes or 0.0 for arm in arms))
  bottom = top + 290
  axes = Axes(canvas, Scale(0, last, plots.LEFT, plots.RIGHT), Scale(low, high, bottom, top + 60))
  axes.grid_y((low, (low + high) / 2, high))
  axes.grid_x((0, last / 2, last))
  canvas.text(plots.RIGHT, bottom + 56, "minutes of one core", size=SMALL, anchor="end", colour=palette.soft)
  for number, arm in enumerate(arms, 1):
    x = arm.minutes or 0.0
    for value in arm.values:
      axes.dot(x, value, palette.soft, radius=5)
    mean = sum(arm.values) / len(arm.values)
    canvas.line([(axes.x(x) - 12, axes.y(mean)), (axes.x(x) + 12, axes.y(mean))], palette.text)
    side, anchor = (16, "start") if axes.x(x) + 48 < canvas.width else (-16, "end")  # in the picture, at its right end
    canvas.text(axes.x(x) + side, axes.y(mean) + 7, str(number), size=SMALL, anchor=anchor, colour=palette.text)
  y = bottom + 60
  for number, arm in enumerate(arms, 1):
    y += 28
    canvas.text(4, y, f"{number}  {arm.name}", size=SMALL, anchor="start", colour=palette.soft)
  return y + 24
