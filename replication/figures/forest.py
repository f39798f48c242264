"""Plot paired differences with their intervals, for the ablations, the emoji and the replication."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from replication.figures.style import INK, OFF, SOFT, TEXT, WIDTH, Figure, ends, reach
from replication.measured import paired, replication

LINE = 0.27  # inches a line


class Comparison(NamedTuple):
  """A row of a forest: its group, its label, a difference for each panel, and the bound of no effect."""

  group: str
  label: str
  differences: Sequence[Mapping[str, Any] | None]
  bound: float = 0.0


def forest(comparisons: Sequence[Comparison], panels: Sequence[str], title: str) -> Figure:
  """Plot differences, one panel for each measured figure. One seed gives no interval: its mark is hollow."""
  rows, y, last = [], 0.0, ""
  for comparison in comparisons:
    heading, last = comparison.group if comparison.group != last else "", comparison.group
    lines = textwrap.wrap(comparison.label, 58)
    y += (1.6 if heading else 0.3) + len(lines) + 0.95
    rows.append((y, heading, lines))
  height = y + 0.6
  # The height leaves room for titles above, and for values and a legend of three lines below.
  figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, LINE * (height + 5)), squeeze=False, sharey=True)
  for i, (axes, panel) in enumerate(zip(grid[0], panels, strict=True)):
    points = [(y, row.differences[i], row.bound) for (y, _, _), row in zip(rows, comparisons, strict=True)]
    far = reach(max(abs(side) for _, difference, bound in points for side in (*ends(difference), bound)))
    axes.set(xlim=(-far, far), ylim=(height, 0), title=panel, xticks=(-far, 0, far), yticks=())
    for tick, side in zip(
      axes.set_xticklabels([f"−{far:g}", "0", f"+{far:g}"]), ("left", "center", "right"), strict=True
    ):
      tick.set_ha(side)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.axvline(0, color=OFF)
    for significant, colour in ((False, SOFT), (True, TEXT)):
      marked = [(y, difference) for y, difference, _ in points if difference is not None]
      same_style = [(y, difference) for y, difference in marked if difference["is_significant"] == significant]
      ranged = [(y, difference) for y, difference in same_style if difference["low"] is not None]
      # One line with gaps takes a fifth of the bytes of many lines.
      x = [value for _, difference in ranged for value in (difference["low"], difference["high"], math.nan)]
      axes.plot(x, [y for y, _ in ranged for _ in range(3)], color=colour, lw=2)
      axes.plot([difference["mean"] for _, difference in ranged], [y for y, _ in ranged], "o", color=colour)
      alone = [(y, difference) for y, difference in same_style if difference["low"] is None]
      axes.plot([difference["mean"] for _, difference in alone], [y for y, _ in alone], "o", color=colour, mfc="none")
    if any(bound for *_, bound in points):
      axes.barh([y for y, *_ in points], [2 * b for *_, b in points], 0.8, [-b for *_, b in points], color=OFF, lw=0)
  first = grid[0, 0]
  axis_transform = first.get_yaxis_transform()
  for y, heading, lines in rows:
    labels = [(heading, INK)] * bool(heading) + [(line, SOFT) for line in lines]
    for k, (words, colour) in enumerate(labels):
      first.text(0, y - 0.7 - (len(labels) - 1 - k), words, color=colour, transform=axis_transform, in_layout=False)
  present = [difference for row in comparisons for difference in row.differences if difference is not None]
  handles = [Line2D([], [], marker="o", ls="", color=SOFT, label="not significant")]
  if any(difference["is_significant"] for difference in present):
    handles.append(Line2D([], [], marker="o", ls="", color=TEXT, label="significant (Holm)"))
  band = "; band: the bound of no effect" if any(comparison.bound for comparison in comparisons) else ""
  figure.legend(handles=handles, loc="outside lower left", ncols=2, title=f"points, 95 % intervals{band}")
  return Figure(figure, title)


def paired_forest(names: Mapping[str, str], panels: Sequence[str], title: str) -> Figure:
  """Plot tables of replication/measured/paired.py, by the names of their groups."""
  comparisons = []
  for name, words in names.items():
    table = paired.table(name)
    columns = [column.name for column in paired.TABLES[name].columns][: len(panels)]
    base = next(row["label"] for row in table["rows"] if row["is_base"])
    for row in table["rows"]:
      if not row["is_base"]:
        differences = [row["cells"][column]["difference"] for column in columns]
        group = f"{words}, against {base}".replace("`", "")
        comparisons.append(Comparison(group, row["label"].replace("`", ""), differences))
  return forest(comparisons, panels, title)


def ablations_forest() -> Figure:
  return paired_forest(
    {
      "table 2": "Table 2, text target",
      "table 3": "Table 3, text schedule",
      "table 4": "Table 4, fusion",
      "table 5": "Table 5, fusion block",
      "table 7": "Table 7, $t_z$",
      "joint training": "Joint training",
      "gamma": "γ and schedule",
    },
    ("images,\nseen", "images,\nunseen", "top-1,\nseen", "top-1,\nunseen", "R@1"),
    "Ablations on rendered shapes: 65 paired differences to each table's base with 95 % intervals over three"
    " seeds. None is significant after Holm's correction.",
  )


EMOJI = ("val\nvendor", "test\nvendor", "its seen\nconcepts", "its R@1", "unseen\nconcepts")


def emoji_forest() -> Figure:
  return paired_forest(
    {"clip": "DiffDis", "both objectives": "Joint training", "generation first": "Generation first"},
    EMOJI,
    "Emoji: paired differences in accuracy with 95 % intervals over three seeds: DiffDis against CLIP, both"
    " objectives against discrimination alone, and generation first against none.",
  )


def emoji_changes_forest() -> Figure:
  return paired_forest(
    {"one change": "One change", "without the additions": "Without the two additions"},
    EMOJI[:3],
    "Emoji: paired differences in accuracy with 95 % intervals over three seeds, one change of the config each,"
    " and CLIP and both objectives without the additions.",
  )


_ARROWS = str.maketrans({"↑": "", "↓": ""})


def replication_forest(records: Mapping[str, Any] | None = None) -> Figure:
  """Plot every primary comparison of the replication, with the bound of no effect as a band."""
  archive, comparisons = records or replication.stored(), []
  for name, question in replication.QUESTIONS.items():
    for claim in archive["claims"].get(name, ()):
      if claim["verdict"]:
        figure = replication.title(archive, name, claim["row"], claim["column"]).translate(_ARROWS)
        label = f"{claim['row']} − {claim['base']}, {figure}"
        difference = claim["verdict"]["difference"]
        comparisons.append(Comparison(f"{name.upper()}: {question}", label, [difference], claim["bound"]))
  count = len(comparisons)
  return forest(
    comparisons,
    ("",),
    f"Primary comparisons of the replication: {count} paired differences with 95 % intervals over seeds.",
  )
