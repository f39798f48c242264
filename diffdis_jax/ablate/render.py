"""Render tables of `summary.summarise` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BLANK = ""
NOTE = (
  "Mean ± standard deviation over the seeds, and their number where it is not all of them; a blank cell is a run that"
  " is missing, not finished or without a finite figure. Below it the mean of the paired differences to the base row,"
  " in bold letters, over the seeds that both have; its 95 % interval by the t distribution of n - 1; p, and p after"
  " Holm's correction over the table's differences. A difference is bold where the latter is below 0.05. Else it is"
  " *undecided*, and MDE, the minimum detectable effect, is the true difference that this t-test by itself would find"
  " with 80 % power at the standard deviation of these pairs: what is smaller may be there and not be found."
)


def markdown(summary: Mapping[str, Any]) -> str:
  """Return a section for each table: of each row the figures, the differences to the base row, and the paper's
  figures."""
  parts = [f"# Ablations of {summary['base']}, seeds {', '.join(map(str, summary['seeds']))}", NOTE]
  for name, table in summary["tables"].items():
    text = table_of(table, columns=summary["columns"], paper=summary["paper_columns"])
    parts.append(f"## {_title(name, table)}\n\n{text}")
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
  text = f"{mean} {interval}, p {shown_p(difference['p'])}, Holm {shown_p(difference['p_holm'])}"
  return f"**{text}**" if difference["is_significant"] else f"{text}, *undecided*, MDE {difference['detectable']:.1f}"


def shown_p(value: float) -> str:
  return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None) -> str:
  return BLANK if value is None else f"{value:z.2f}"
