"""Render tables of `summary.summarise` as Markdown and as a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.errors import not_installed

BLANK = ""
NOTE = (
  "Mean ± standard deviation over the seeds, and their number where it is not all of them; a blank cell is a run that"
  " is missing, not finished or without a finite figure. Below it the mean of the paired differences to the base row,"
  " in bold letters, over the seeds that both have; its 95 % interval by the t distribution of n - 1; p, and p after"
  " Holm's correction over the table's differences. A difference is bold where the latter is below 0.05. Else it is"
  " *undecided*, and MDE, the minimum detectable effect, is the true difference that this t-test by itself would find"
  " with 80 % power at the standard deviation of these pairs: what is smaller may be there and not be found."
)
CLAIM_HEADS = (
  *("comparison", "figure", "difference, 95 % interval", "n", "p, Holm"),
  *("MDE", "bound", "p, Holm", "verdict"),
)
CLAIMS_NOTE = (
  "Paired by seed. The first p is of no difference, by the t-test; the second of a true difference of the bound or"
  " more, by two one-sided tests. Each stands beside its value after Holm's correction over this table, by which the"
  " verdict is made at 5 %. MDE is the true difference that the uncorrected t-test finds with 80 % power."
)
ROW_HEIGHT, PANEL_WIDTH = 0.34, 2.0  # inches


def markdown(summary: Mapping[str, Any]) -> str:
  """Return a section for each table: of each row the figures, the differences to the base row, and the paper's
  figures."""
  parts = [f"# Ablations of {summary['base']}, seeds {', '.join(map(str, summary['seeds']))}", NOTE]
  for name, table in summary["tables"].items():
    text = table_of(table, columns=summary["columns"], paper=summary["paper_columns"])
    parts.append(f"## {_title(name, table)}\n\n{text}")
  if summary["claims"]:
    parts += ["## Comparisons named before the runs", claims_of(summary["claims"])]
  return "\n\n".join(parts) + "\n"


def table_of(table: Mapping[str, Any], *, columns: Mapping[str, str], paper: Mapping[str, str]) -> str:
  """Return a table of `summary.table_of`, and below it how many differences are significant, and by chance.

  Args:
    table: as tables.json has it.
    columns: name -> title.
    paper: the same, of the paper's figures.
  """
  # The paper's figures stand in the columns that measure the same; of those that nothing here measures, in their own.
  others = {name: f"{title} (paper)" for name, title in paper.items() if name not in columns}
  heads = ["", *columns.values(), *(others.values() if any(row["paper"] for row in table["rows"]) else ())]
  lines = [heads, ["---"] * len(heads)]
  for row in table["rows"]:
    lines += _lines(row, [*columns], [*others])
  text = "\n".join("| " + " | ".join((*line, *[BLANK] * (len(heads) - len(line)))) + " |" for line in lines)
  return f"{text}\n\n{_count(table['count'])}" if table["count"]["differences"] else text


def claims_of(claims: Sequence[Mapping[str, Any]]) -> str:
  """Return a table of `summary.claims_of`."""
  lines = [f"| {' | '.join(CLAIM_HEADS)} |", "|---" * len(CLAIM_HEADS) + "|"]
  lines += ["| " + " | ".join(claim_cells(claim)) + " |" for claim in claims]
  return "\n".join(lines) + f"\n\n{CLAIMS_NOTE}"


def claim_cells(claim: Mapping[str, Any]) -> list[str]:
  """Return a row of that table."""
  return [f"{claim['row']} − {claim['base']}", claim["column"], *_verdict(claim["verdict"], claim["bound"])]


def _verdict(verdict: Mapping[str, Any] | None, bound: float) -> list[str]:
  if verdict is None:
    return [BLANK] * 4 + [f"{bound:g}", BLANK, BLANK]
  difference, n = verdict["difference"], str(verdict["difference"]["n"])
  if difference["p"] is None:
    return [f"{difference['mean']:+z.2f}", n, BLANK, BLANK, f"{bound:g}", BLANK, verdict["words"]]
  interval = f"{difference['mean']:+z.2f} [{difference['low']:+z.2f}, {difference['high']:+z.2f}]"
  p_values = [f"{_p(difference['p'])}, {_p(difference['p_holm'])}"]
  equivalent = f"{_p(verdict['p_equivalent'])}, {_p(verdict['p_equivalent_holm'])}"
  return [interval, n, *p_values, f"{difference['detectable']:.1f}", f"{bound:g}", equivalent, verdict["words"]]


def _title(name: str, table: Mapping[str, Any]) -> str:
  return f"Table {name}: {table['title']}" if name.isdecimal() else table["title"]


def _count(count: Mapping[str, Any]) -> str:
  return (
    f"{count['significant']} of {count['differences']} differences bold; chance alone makes any bold in at most 5 % of"
    f" such tables. Before Holm's correction {count['uncorrected']} have p < 0.05; chance gives"
    f" {count['uncorrected_by_chance']:.3g}."
  )


def _lines(row: Mapping[str, Any], columns: Sequence[str], others: Sequence[str]) -> list[list[str]]:
  label = f"**{row['label']}**" if row["is_base"] else row["label"]
  lines = [[label, *(_figure(row["cells"][name], len(row["runs"])) for name in columns)]]
  differences = [row["cells"][name]["difference"] for name in columns]
  if any(differences):
    lines.append(["− base", *(_difference(each) if each else BLANK for each in differences)])
  if row["paper"]:
    lines.append(["*paper*", *(_number(row["paper"].get(name)) for name in (*columns, *others))])
  return lines


def _figure(cell: Mapping[str, Any], seeds: int) -> str:
  if not cell["n"]:
    return BLANK
  spread = "" if cell["sd"] is None else f" ± {cell['sd']:z.2f}"
  # A single seed has no spread beside it that would show how many there are.
  return f"{cell['mean']:z.2f}{spread}" + (f" (n = {cell['n']})" if cell["n"] < seeds or seeds == 1 else "")


def _difference(difference: Mapping[str, Any]) -> str:
  mean = f"{difference['mean']:+z.2f}"
  if difference["se"] is None:
    return mean
  if difference["p"] is None:
    return f"{mean} in every seed, *undecided*"
  interval = f"[{difference['low']:+z.2f}, {difference['high']:+z.2f}]"
  text = f"{mean} {interval}, p {_p(difference['p'])}, Holm {_p(difference['p_holm'])}"
  return f"**{text}**" if difference["is_significant"] else f"{text}, *undecided*, MDE {difference['detectable']:.1f}"


def _p(value: float) -> str:
  return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None) -> str:
  return BLANK if value is None else f"{value:z.2f}"


def plot(summary: Mapping[str, Any]) -> bytes:
  """Return a PNG: a panel for each table and column, in which each row has its seeds, their mean and standard
  deviation. The base row's mean is a line through its panel.

  Raises:
    UserError: matplotlib is not installed.
  """
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError as error:
    raise not_installed("the figure", "matplotlib", "plot", otherwise="give --noplot") from error
  tables, columns = [*summary["tables"].values()], summary["columns"]
  heights = [len(table["rows"]) + 1.2 for table in tables]
  size = (2.2 + PANEL_WIDTH * len(columns), 0.5 + ROW_HEIGHT * sum(heights) + 0.45 * len(tables))
  # Without pyplot, which would look for a display and keep each figure.
  figure = Figure(figsize=size, layout="constrained")
  # One scale a column, so that tables can be compared.
  panels = figure.subplots(len(tables), len(columns), squeeze=False, height_ratios=heights, sharex="col", sharey="row")
  for axes, title in zip(panels[-1], columns.values(), strict=True):
    axes.set_xlabel(title.translate(_ARROWS), fontsize=8)
  for line, (number, table) in zip(panels, summary["tables"].items(), strict=True):
    for axes, name in zip(line, columns, strict=True):
      _draw(axes, table["rows"], name)
    line[0].set_yticks(range(len(table["rows"])), [row["label"] for row in table["rows"]], fontsize=8)
    # From the top down, as in the table.
    line[0].set_ylim(len(table["rows"]) - 0.5, -0.5)
    line[0].set_title(_title(number, table), fontsize=9, loc="left", fontweight="bold")
  # As bytes, so that the caller writes it whole, also into a bucket.
  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=200)
  return buffer.getvalue()


_ARROWS = str.maketrans({"↑": "(higher is better)", "↓": "(lower is better)"})


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
  for place, row in enumerate(rows):
    cell, colour = row["cells"][name], "#b5432a" if row["is_base"] else "#2b5c8a"
    if not cell["n"]:
      axes.text(0.5, place, "no run", transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=7)
      continue
    values = [*cell["values"].values()]
    axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.3, markersize=4, markeredgewidth=0)
    axes.errorbar(cell["mean"], place, xerr=cell["sd"], fmt="D", color=colour, markersize=4.5, capsize=2.5, linewidth=1)
    if row["is_base"]:
      axes.axvline(cell["mean"], color=colour, linewidth=0.8, linestyle=":", zorder=0)
  axes.tick_params(axis="x", labelsize=7)
  axes.tick_params(axis="y", length=0)
  axes.grid(axis="x", color="#dddddd", linewidth=0.5)
  axes.set_axisbelow(True)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
