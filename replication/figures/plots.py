"""The plots of the book, each from measured records (replication/measured) alone. `make figures` draws them.

A plot is a function from a palette to an SVG. PLOTS names them all: docs/figures/NAME.svg.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.data.shapes import COLOURS, OUTLINES, SHAPES, UNSEEN
from replication.figures.style import LARGE, SMALL, Axes, Canvas, Palette, Scale
from replication.measured import paired, records

LEFT, RIGHT = 70, 700  # of most plots' frames


def legend(canvas: Canvas, y: float, entries: Sequence[tuple[str, str]], *, left: float = 4, step: float = 0) -> None:
  """Draw a row of dots with words; each at its own place, or `step` apart."""
  x = left
  for words, colour in entries:
    canvas.dot(x + 8, y - 7, colour, radius=7)
    canvas.text(x + 24, y, words, size=SMALL, anchor="start")
    x += step or 52 + 11.5 * len(words)


# Ablations.


def forest(palette: Palette, names: Mapping[str, str], titles: Sequence[tuple[str, str]], *, title: str) -> str:
  """Plot paired differences of some tables, one panel a figure that was measured, one line a comparison.

  Args:
    names: table of replication/measured/paired.py -> heading.
    titles: of the panels, in two lines.
    title: what the figure shows, in words.
  """
  found = {name: paired.table(name) for name in names}
  columns = [column.name for column in paired.TABLES[next(iter(names))].columns]
  differences = [
    (name, row["label"].replace("`", ""), {column: row["cells"][column]["difference"] for column in columns})
    for name, table in found.items()
    for row in table["rows"]
    if not row["is_base"]
  ]
  canvas = Canvas(palette)
  gap, width = 16, (canvas.width - 16 * (len(columns) - 1)) / len(columns)
  lefts = [i * (width + gap) for i in range(len(columns))]
  for left, lines in zip(lefts, titles, strict=True):
    for i, line in enumerate(lines):
      canvas.text(left + width / 2, 24 + 26 * i, line, size=SMALL)
  scales = []
  for left, column in zip(lefts, columns, strict=True):
    sides = [abs(end) for _, _, row in differences for end in ends(row[column])]
    far = reach(max(sides))
    scales.append(Scale(-far, far, left + 4, left + width - 4))
  top = y = 24 + 26 * len(titles[0])
  body = Canvas(palette)  # above the lines at zero, which need its height
  last = ""
  for name, label, row in differences:
    if name != last:
      base = next(each["label"] for each in found[name]["rows"] if each["is_base"]).replace("`", "")
      y += 46 if last else 30
      body.label(4, y, f"{names[name]}, against {base}")
      last = name
    y += 34
    for i, line in enumerate(textwrap.wrap(label, 58)):
      y += 26 if i else 0
      body.label(4, y, line, colour=palette.soft)
    y += 22
    for scale, column in zip(scales, columns, strict=True):
      if (difference := row[column]) is not None:
        interval(body, scale, y, difference)
  bottom = y + 16
  for scale in scales:
    canvas.line([(scale(0), top), (scale(0), bottom)], palette.off, width=2)
    for tick in (scale.low, 0, scale.high):
      anchor = "start" if tick < 0 else "end" if tick > 0 else "middle"
      words = f"{tick:+g}".replace("-", "−") if tick else "0"
      canvas.text(scale(tick), bottom + 26, words, size=SMALL, colour=palette.soft, anchor=anchor)
  canvas.parts += body.parts
  judged = [each for _, _, row in differences for each in row.values() if each is not None]
  entries = [("undecided", palette.soft), ("significant (Holm)", palette.text)]
  legend(canvas, bottom + 62, entries[: 2 if any(each["is_significant"] for each in judged) else 1])
  canvas.text(canvas.width - 4, bottom + 62, "points, 95 % intervals", size=SMALL, anchor="end", colour=palette.soft)
  return canvas.svg(bottom + 76, title)


def ends(difference: Mapping[str, Any] | None) -> list[float]:
  if difference is None:
    return []
  return [difference["mean"] if difference[key] is None else difference[key] for key in ("low", "high")]


def reach(value: float) -> float:
  """Return the least of 1, 2, 3, 4, 5, 6 and 8 times a power of ten that is not below it; 1 of 0, where nothing
  differs."""
  power = 10.0 ** math.floor(math.log10(value)) if value else 1.0
  return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= value)


def interval(canvas: Canvas, scale: Scale, y: float, difference: Mapping[str, Any]) -> None:
  """Draw mean and interval; hollow and without one where a single seed gives none."""
  palette = canvas.palette
  colour = palette.text if difference["is_significant"] else palette.soft
  if difference["low"] is not None:
    canvas.line([(scale(difference["low"]), y), (scale(difference["high"]), y)], colour)
  canvas.dot(scale(difference["mean"]), y, colour, hollow=difference["low"] is None)


def ablations_forest(palette: Palette) -> str:
  return forest(
    palette,
    {
      "table 2": "Table 2, text target",
      "table 3": "Table 3, text schedule",
      "table 4": "Table 4, fusion",
      "table 5": "Table 5, fusion block",
      "table 7": "Table 7, t_z",
      "joint training": "Joint training",
      "gamma": "γ and schedule",
    },
    (("images,", "seen"), ("images,", "unseen"), ("top-1,", "seen"), ("top-1,", "unseen"), ("R@1", "")),
    title="Ablations on rendered shapes: 65 paired differences to each table's base with 95 % intervals over three"
    " seeds. None is significant after Holm's correction.",
  )


EMOJI_TITLES = (
  ("val", "vendor"),
  ("test", "vendor"),
  ("its seen", "concepts"),
  ("its R@1", ""),
  ("unseen", "concepts"),
)


def emoji_forest(palette: Palette) -> str:
  return forest(
    palette,
    {"clip": "DiffDis", "both objectives": "Joint training", "generation first": "Generation first"},
    EMOJI_TITLES,
    title="Emoji: paired differences in accuracy with 95 % intervals over three seeds: DiffDis against CLIP, both"
    " objectives against discrimination alone, and generation first against none.",
  )


def emoji_changes_forest(palette: Palette) -> str:
  return forest(
    palette,
    {"one change": "One change", "without the additions": "Without the two additions"},
    EMOJI_TITLES[:3],
    title="Emoji: paired differences in accuracy with 95 % intervals over three seeds, one change of the config each,"
    " and CLIP and both objectives without the additions.",
  )


# Emoji: steps of generation first.


def emoji_generation_first(palette: Palette) -> str:
  """Plot top-1 over steps of generation alone before discrimination; a dot a seed, a line through the means."""
  runs = {
    5400: {
      0: "no_generation_discrimination_5400",
      1800: "held_temperature_discrimination",
      3600: "generation_3600_first_discrimination",
      5400: "generation_5400_first_discrimination",
    },
    1800: {
      0: "held_temperature_discrimination_1800_epyc",
      1800: "generation_first_discrimination_1800",
      3600: "generation_3600_first_discrimination_1800",
    },
  }
  asked = paired.TABLES["generation first"]
  canvas = Canvas(palette)
  canvas.text(4, 26, "zero-shot top-1, %", size=SMALL, anchor="start", colour=palette.soft)
  colours = {5400: palette.text, 1800: palette.soft}
  bottom = 400
  for left, column, title in ((60, "val_vendor/acc1", "val vendor"), (408, "test_vendor/acc1", "test vendor")):
    axes = Axes(canvas, Scale(-300, 5700, left, left + 282), Scale(20, 70, bottom, 90))
    canvas.text(left + 141, 66, title, size=SMALL)
    axes.grid_y((20, 30, 40, 50, 60, 70))
    axes.grid_x((0, 1800, 3600, 5400), "{:,}".format)
    for steps, starts in runs.items():
      seeds = {x: [*paired.figures_of(asked, start)[column].values()] for x, start in starts.items()}
      axes.line([(x, sum(values) / len(values)) for x, values in seeds.items()], colours[steps])
      for x, values in seeds.items():
        for value in values:
          axes.dot(x, value, colours[steps])
  canvas.text(canvas.width / 2, bottom + 62, "steps of generation alone, before", size=SMALL, colour=palette.soft)
  canvas.text(4, bottom + 104, "steps of discrimination, after:", size=SMALL, anchor="start", colour=palette.soft)
  legend(canvas, bottom + 104, [("5,400", palette.text), ("1,800", palette.soft)], left=330, step=130)
  title = (
    "Emoji: zero-shot accuracy rises with the steps of generation before discrimination, on val_vendor and test_vendor,"
    " after 1,800 and after 5,400 steps of discrimination. A dot is a seed."
  )
  return canvas.svg(bottom + 120, title)


# Long-tailed recognition.


def long_tail(palette: Palette) -> str:
  """Plot accuracy by how many training images a class has, DiffDis and CLIP, mean and standard deviation."""
  groups = {"all": "all", "many": "> 99", "median": "21–99", "low": "≤ 20"}
  colours = {"DiffDis": palette.text, "CLIP": palette.soft}
  canvas = Canvas(palette)
  canvas.text(4, 26, "accuracy after stage 2, %", size=SMALL, anchor="start", colour=palette.soft)
  legend(canvas, 26, [*colours.items()], left=430, step=140)
  bottom = 380
  axes = Axes(canvas, Scale(-0.5, 3.5, LEFT, RIGHT), Scale(0, 100, bottom, 60))
  axes.grid_y((0, 20, 40, 60, 80, 100))
  for i, (group, label) in enumerate(groups.items()):
    canvas.text(axes.x(i), bottom + 28, group, size=SMALL)
    canvas.text(axes.x(i), bottom + 54, label if group != "all" else "", size=SMALL, colour=palette.soft)
    for shift, (model, colour) in zip((-0.2, 0.2), colours.items(), strict=True):
      found = records.record("long_tail", f"{model.lower()}/acc/{group}")
      mean, sd, x = found.mean or 0.0, found.sd or 0.0, axes.x(i + shift)
      canvas.fill(x - 26, axes.y(mean), 52, axes.y(0) - axes.y(mean), colour, opacity=0.35)
      canvas.line([(x, axes.y(mean - sd)), (x, axes.y(mean + sd))], colour)
      canvas.dot(x, axes.y(mean), colour)
  canvas.text(canvas.width / 2, bottom + 90, "classes by number of training images", size=SMALL, colour=palette.soft)
  title = (
    "Long-tailed shapes: accuracy after stage 2 on all classes and on those with many, some and few training images,"
    " DiffDis and CLIP, mean and standard deviation of three seeds. No difference is significant after correction."
  )
  return canvas.svg(bottom + 106, title)


# Compilers' estimates.

SIGNS = {"at least": "≥ ", "at most": "≤ ", "about": "≈ "}
INVERSE = {"at least": "≤ ", "at most": "≥ ", "about": "≈ "}  # of a time, where the sign is a rate's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """The estimate of preflight for a layout: memory in GiB, step in ms, images a second of all chips."""

  chip: str
  chips: int
  data: int
  fsdp: int
  batch: int
  memory: float
  available: float
  step: float
  rate: float
  bound: str


def estimates() -> list[Estimate]:
  """Return the estimates of the paper's joint step, by replication/measured/estimates.json."""
  made = []
  for record in records.load("estimates").values():
    if record.what.startswith("joint step of the paper"):
      values, of = record.values, record.of
      chip, _, layout = of["topology"].partition(":")
      chips = math.prod(int(part) for part in layout.split("x"))
      mesh = dict(part.split("=") for part in of.get("mesh", "fsdp=4").split(","))  # 4 in preflight.md's command
      fsdp = chips if mesh["fsdp"] == "-1" else int(mesh["fsdp"])
      rate = values["images/s"]
      # Where no time is recorded it follows from the rate.
      times = [values[name] for name in ("optimal_seconds, ms", "cycles, ms") if name in values]
      made.append(
        Estimate(
          chip=chip if chip.startswith("v") else chip.upper(),
          chips=chips,
          data=chips // fsdp,
          fsdp=fsdp,
          batch=of["batch"],
          memory=values["memory a chip, GiB"],
          available=values["of GiB"],
          step=times[0] if times else 1000 * of["batch"] / rate,
          rate=rate,
          bound=next((bound for bound in SIGNS if of.get("bound", "").startswith(bound)), "about"),
        )
      )
  return made


def _bar(canvas: Canvas, x: float, y: float, width: float, colour: str, bound: str) -> None:
  """Draw a bar, full for an estimate and a lower bound, empty for an upper one."""
  if bound == "at most":
    canvas.box(x + 1, y + 1, max(width - 2, 2), 16, stroke=colour, fill=canvas.palette.ground, round=2)
  else:
    canvas.fill(x, y, width, 18, colour)


def chips(palette: Palette) -> str:
  """Plot memory a chip, images a second and chip, and the step's time; of each number of chips the first layout."""
  rows: dict[tuple[str, int], Estimate] = {}
  for row in estimates():
    rows.setdefault((row.chip, row.chips), row)
  canvas = Canvas(palette)
  canvas.text(4, 26, "memory a chip, GiB", size=SMALL, anchor="start", colour=palette.image)
  canvas.text(372, 26, "images/s a chip", size=SMALL, anchor="start", colour=palette.text)
  most = max(row.rate / row.chips for row in rows.values())
  memory, rate = Scale(0, max(row.available for row in rows.values()), 0, 200), Scale(0, most, 0, 240)
  y = 40.0
  for row in rows.values():
    words = f"{row.chips} {row.chip}, batch {row.batch:,}"
    canvas.text(4, y + 24, words, size=SMALL, anchor="start")
    words = f"step {INVERSE[row.bound]}{round(row.step, 1):g} ms"
    canvas.text(canvas.width - 4, y + 24, words, size=SMALL, anchor="end", colour=palette.soft)
    canvas.fill(4, y + 34, memory(row.available), 18, palette.off, opacity=0.6)
    canvas.fill(4, y + 34, memory(row.memory), 18, palette.image)
    words = f"{row.memory:g} of {row.available:g}"
    canvas.text(4 + memory(row.available) + 10, y + 51, words, size=SMALL, anchor="start", colour=palette.soft)
    width = rate(row.rate / row.chips)
    _bar(canvas, 372, y + 34, width, palette.text, row.bound)
    words = f"{SIGNS[row.bound]}{row.rate / row.chips:,.0f}"
    canvas.text(372 + width + 10, y + 51, words, size=SMALL, anchor="start", colour=palette.soft)
    y += 70
  canvas.text(4, y + 26, "Empty bars: upper bounds, at the chips' peak.", size=SMALL, anchor="start")
  canvas.text(4, y + 54, "Compilers' estimates; nothing was run on these chips.", size=SMALL, anchor="start")
  title = "Compilers' estimates of a joint training step at 256 px by chip: memory, images a second and step time."
  return canvas.svg(y + 70, title)


def mesh(palette: Palette) -> str:
  """Plot images a second and memory a chip, of the chips that were asked about in several layouts."""
  layouts = estimates()
  several = [name for name, count in Counter(row.chip for row in layouts).items() if count > 1]
  canvas = Canvas(palette)
  canvas.text(4, 26, "images/s of all chips", size=SMALL, anchor="start", colour=palette.text)
  canvas.text(canvas.width - 4, 26, "memory a chip", size=SMALL, anchor="end", colour=palette.image)
  y = 40.0
  for name in several:
    chosen = [row for row in layouts if row.chip == name]
    scale = Scale(0, max(row.rate for row in chosen), 0, 590)
    canvas.text(4, y + 26, name, size=LARGE, anchor="start")
    y += 32
    for row in chosen:
      words = f"{row.chips} chips, data {row.data} × fsdp {row.fsdp}, batch {row.batch:,}"
      canvas.text(4, y + 26, words, size=SMALL, anchor="start")
      words = f"{row.memory:g} of {row.available:g} GiB"
      canvas.text(canvas.width - 4, y + 26, words, size=SMALL, anchor="end", colour=palette.image)
      width = scale(row.rate)
      _bar(canvas, 4, y + 36, width, palette.text, row.bound)
      words = f"{SIGNS[row.bound]}{row.rate:,.0f}"
      canvas.text(4 + width + 10, y + 53, words, size=SMALL, anchor="start", colour=palette.soft)
      y += 68
    y += 14
  canvas.text(4, y + 14, "Each chip has its own scale. Empty bars: upper bounds.", size=SMALL, anchor="start")
  canvas.text(4, y + 42, "Compilers' estimates; nothing was run on these chips.", size=SMALL, anchor="start")
  title = f"Compilers' estimates of images a second and memory a chip by mesh: {', '.join(several)}."
  return canvas.svg(y + 58, title)


def scaling(palette: Palette) -> str:
  """Plot what the parts of a joint step take as chips are added, each with its share of the batch; a panel a kind."""
  kinds: dict[str, list[records.Record]] = {}
  for name, each in records.load("estimates").items():
    if name.startswith("weak scaling/"):
      kinds.setdefault(each.of["topology"].partition(":")[0], []).append(each)
  parts = {"computing": palette.text, "exchange": palette.image, "latency": palette.soft}
  canvas = Canvas(palette)
  canvas.text(4, 26, "ms", size=SMALL, anchor="start", colour=palette.soft)
  legend(canvas, 26, [*parts.items()], left=110, step=160)
  y = 44.0
  for kind, found in kinds.items():
    first, name = found[0].of, kind if kind.startswith("v") else f"{kind.upper()}s"
    words = f"{name}, {first['batch'] // first['chips']} images a chip"
    canvas.text(LEFT, y + 26, words, size=SMALL, anchor="start")
    top, bottom = y + 72, y + 72 + 240
    longest = math.ceil(max(each.values["step, ms"] for each in found) / 50) * 50
    axes = Axes(canvas, Scale(-0.5, len(found) - 0.5, LEFT, RIGHT), Scale(0, longest, bottom, top))
    axes.grid_y(range(0, longest + 1, 50))
    for i, each in enumerate(found):
      values, fitted, below = each.values, each.of["row"] == "fitted", 0.0
      hops = values["hops, ms"]
      for part, took in (
        ("computing", values["computing, ms"]),
        ("exchange", values["step, ms"] - values["computing, ms"] - hops),
        ("latency", hops),
      ):
        end = axes.y(below + took)
        canvas.fill(axes.x(i) - 34, end, 68, axes.y(below) - end, parts[part], opacity=0.45 if fitted else 0.9)
        below += took
      canvas.text(axes.x(i), axes.y(below) - 10, f"{values['efficiency, %']:.0f} %", size=SMALL)
      canvas.text(axes.x(i), bottom + 28, f"{each.of['chips']}", size=SMALL)
    y = bottom + 40
  pale = "; pale: fitted" if any(each.of["row"] == "fitted" for found in kinds.values() for each in found) else ""
  for i, words in enumerate((f"chips{pale}", "above: images/s of a chip against the fewest chips")):
    canvas.text(canvas.width / 2, y + 22 + 28 * i, words, size=SMALL, colour=palette.soft)
  title = (
    f"Weak scaling of the joint step on {', '.join(kinds)} up to 256 chips by the compilers: computing, what moves"
    " over links and network, and latency, in milliseconds, where nothing overlaps. Nothing was run on these chips."
  )
  return canvas.svg(y + 66, title)


# The demo.


def demo_seeds(palette: Palette) -> str:
  """Plot accuracy of each seed on two kinds of processor, a line a figure, with their means."""
  rows = {
    "seen": "zero-shot, seen pairs",
    "unseen": "zero-shot, unseen pairs",
    "worst": "zero-shot, the worst unseen pair",
    "generated_seen": "generated images, seen pairs",
    "generated_unseen": "generated images, unseen pairs",
  }
  processors = {"epyc": ("AMD EPYC", palette.text), "xeon": ("Intel Xeon", palette.image)}
  canvas = Canvas(palette)
  legend(canvas, 26, [*processors.values()], step=165)
  canvas.text(canvas.width - 4, 26, "dots: seeds, strokes: means; %", size=SMALL, anchor="end", colour=palette.soft)
  top, height = 44, 84
  bottom = top + height * len(rows)
  axes = Axes(canvas, Scale(50, 100, 24, 690), Scale(0, 1, bottom, top))
  axes.grid_x((50, 60, 70, 80, 90, 100), lines=True)
  for i, (name, words) in enumerate(rows.items()):
    y = top + height * i + 28
    canvas.label(24, y, words)
    for j, (processor, (_, colour)) in enumerate(processors.items()):
      values = [*records.record("demo", f"{name}/{processor}").values.values()]
      at, mean = y + 20 + 20 * j, sum(values) / len(values)
      canvas.line([(axes.x(min(values)), at), (axes.x(max(values)), at)], colour, width=1.5)
      canvas.line([(axes.x(mean), at - 9), (axes.x(mean), at + 9)], colour)
      for value in values:
        axes.canvas.dot(axes.x(value), at, colour, opacity=0.75)
  title = (
    "make demo: accuracy by seed on 64 classes of rendered shapes, zero-shot and of generated images, on pairs that"
    " training saw and on pairs that it never saw; four seeds on each of two processors."
  )
  return canvas.svg(bottom + 44, title)


def demo_training(palette: Palette) -> str:
  """Plot the loss and its two parts over the steps of the demo, on an axis of decades."""
  lines = (("L_ITA", "loss_discrimination", palette.text), ("L_IG", "loss_generation", palette.image))
  lines = (*lines, ("loss", "loss", palette.ink))
  curves = {
    name: {int(step): value for step, value in records.record("demo_run", f"training/{name}").values.items()}
    for _, name, _ in lines
  }
  values = [value for curve in curves.values() for value in curve.values()]
  low, high = (10.0 ** round_(math.log10(end)) for round_, end in ((math.floor, min(values)), (math.ceil, max(values))))
  last = max(curves["loss"])
  canvas = Canvas(palette)
  legend(canvas, 26, [(words, colour) for words, _, colour in lines], left=LEFT, step=130)
  bottom = 420
  axes = Axes(canvas, Scale(0, last, LEFT, RIGHT - 20), Scale(low, high, bottom, 50, log=True))
  axes.grid_y([10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)])
  axes.grid_x([last * i // 3 for i in range(4)], "{:,}".format)
  for _, name, colour in lines:
    axes.line(curves[name].items(), colour, width=2.5)
  canvas.text((LEFT + RIGHT) / 2, bottom + 60, "step", size=SMALL, colour=palette.soft)
  title = "Training of make demo: the loss, and its parts L_IG (generation) and L_ITA (discrimination), over the steps."
  return canvas.svg(bottom + 76, title)


def demo_by_class(palette: Palette) -> str:
  """Plot zero-shot accuracy of each pair of colour and shape; a frame marks those that training never saw."""
  found = records.record("demo_run", "accuracy by class").values
  canvas = Canvas(palette)
  left, top, side = 96, 60, 76
  for j, shape in enumerate(SHAPES):
    _outline(canvas, shape, left + side * j + side / 2, 30, 20)
  for i, colour in enumerate(COLOURS):
    canvas.text(left - 12, top + side * i + side / 2 + 7, colour, size=SMALL, anchor="end")
    for j, shape in enumerate(SHAPES):
      value, x, y = found[f"{colour} {shape}"], left + side * j, top + side * i
      share = max(0.0, (value - 50) / 50)
      canvas.fill(x + 2, y + 2, side - 4, side - 4, palette.text, opacity=0.05 + 0.35 * share)
      if (colour, shape) in UNSEEN:
        canvas.box(x + 3, y + 3, side - 6, side - 6, stroke=palette.image, fill="none", round=3, width=5)
      canvas.text(x + side / 2, y + side / 2 + 7, f"{value:.0f}", size=SMALL)
  bottom = top + side * len(COLOURS)
  canvas.box(left + 4, bottom + 14, 22, 22, stroke=palette.image, fill="none", round=3, width=5)
  canvas.text(left + 38, bottom + 32, "never seen in training", size=SMALL, anchor="start")
  canvas.text(canvas.width - 20, bottom + 32, "top-1 of 64 classes, %", size=SMALL, anchor="end", colour=palette.soft)
  title = (
    "make demo: zero-shot accuracy of each of the 64 pairs of colour and shape, of one run; the eight pairs that"
    " training never saw are framed."
  )
  return canvas.svg(bottom + 48, title)


def _outline(canvas: Canvas, shape: str, x: float, y: float, radius: float) -> None:
  """Draw a shape as the data set has it, in one colour."""
  for part in OUTLINES[shape]:
    points = [(x + radius * px, y + radius * py) for px, py in part]
    canvas.polygon(points, stroke=canvas.palette.soft, fill="none")


def best_of_n(palette: Palette) -> str:
  """Plot accuracy of the generated image whose own text query is nearest to the prompt's, of n."""
  canvas = Canvas(palette)
  lines = {"seen": ("seen pairs", palette.image), "unseen": ("unseen pairs", palette.text)}
  curves = {
    name: {int(n): value for n, value in records.record("demo_run", f"best of n/{name}").values.items()}
    for name in lines
  }
  legend(canvas, 60, [*lines.values()], left=LEFT, step=170)
  canvas.text(4, 26, "accuracy of the image that is kept, %", size=SMALL, anchor="start", colour=palette.soft)
  values = [value for curve in curves.values() for value in curve.values()]
  step = 5 if min(values) > 75 else 10
  low = step * math.floor((min(values) - 1) / step)
  bottom = 380
  axes = Axes(canvas, Scale(0.9, 9, LEFT, RIGHT, log=True), Scale(low, 100, bottom, 84))
  axes.grid_y(range(low, 101, step))
  axes.grid_x([*curves["seen"]])
  for name, (_, colour) in lines.items():
    axes.line(curves[name].items(), colour)
    for n, value in curves[name].items():
      axes.dot(n, value, colour)
  canvas.text((LEFT + RIGHT) / 2, bottom + 62, "images generated for a prompt", size=SMALL, colour=palette.soft)
  title = (
    "make demo: accuracy of generated images where the model itself keeps the best of n, by the similarity of the"
    " image's denoised query and the prompt's text query."
  )
  return canvas.svg(bottom + 80, title)


def denoising(palette: Palette) -> str:
  """Plot generation over denoising steps: the latent as it is, and what the network predicts from it."""
  of = records.record("demo_run", "denoising").of
  png = (records.HERE / "denoising.png").read_bytes()
  prompts, steps, pixels = of["prompts"], of["t"], of["image_size"]
  canvas = Canvas(palette)
  left, gap = 96, 6
  side = (canvas.width - left - gap * (len(steps) - 1)) / len(steps)
  canvas.define_picture("grid", pixels * len(steps), pixels * 2 * len(prompts), png)
  canvas.text(4, 26, "t =", size=SMALL, anchor="start", colour=palette.soft)
  for j, t in enumerate(steps):
    canvas.text(left + (side + gap) * j + side / 2, 26, str(t), size=SMALL, colour=palette.soft)
  y = 40.0
  for i, prompt in enumerate(prompts):
    canvas.text(left, y + 22, prompt, size=SMALL, anchor="start")
    y += 34
    for row, words in enumerate(("z_t", "ẑ_0")):
      canvas.text(left - 20, y + side / 2 + 7, words, size=SMALL, anchor="end", colour=palette.soft)
      for j in range(len(steps)):
        part = (pixels * j, pixels * (2 * i + row), pixels, pixels)
        canvas.cut("grid", part, left + (side + gap) * j, y, side, side)
      y += side + gap
    y += 12
  title = (
    "Generation by the demo's model over denoising steps, from noise to the image: the latent z_t, decoded, and the"
    f" image that the network predicts from the step before, for {', '.join(prompts)}."
  )
  return canvas.svg(y, title)


PLOTS = {
  plot.__name__: plot
  for plot in (
    demo_training,
    demo_seeds,
    demo_by_class,
    best_of_n,
    denoising,
    ablations_forest,
    emoji_forest,
    emoji_changes_forest,
    emoji_generation_first,
    long_tail,
    chips,
    mesh,
    scaling,
  )
}
