"""Summarise the figures of tables, as data and as Markdown: mean, spread and number over seeds, and paired differences
to the base row."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from diffdis_jax.ablate import significance
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.ablate.run import Folder, seconds_per_step
from diffdis_jax.ablate.tables import PAPER_METRICS, Column, Table, columns_of, measured
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals.results import Results
from diffdis_jax.run import provenance

BLANK = ""
NOTE = (
  "Mean ± standard deviation over the seeds, and their number where it is not all of them; a blank cell is a run that"
  " is missing, not finished or without a finite figure. Below it the mean of the paired differences to the base row,"
  " in bold letters, over the seeds that both have; its 95 % interval by the t distribution of n - 1; p, and p after"
  " Holm's correction over the table's differences. A difference is bold where the latter is below 0.05. Else it is"
  " *undecided*, and MDE, the minimum detectable effect, is the true difference that this t-test by itself would find"
  " with 80 % power at the standard deviation of these pairs: what is smaller may be there and not be found."
)
Figures = Mapping[str, Mapping[int, float]]  # of a row: column -> seed -> figure


def summarise(plan: Plan, folder: Folder, *, base: str) -> dict[str, Any]:
  """Return the content of tables.json for the runs that are finished. `base` is how the base config was named. Raises
  UserError: results that are none, or two of one row by different protocols."""
  columns = measured(columns_of(plan.base["evals"]), (run.evals for runs in plan.rows.values() for run in runs))
  results = read_results(plan, folder)
  count = collections.Counter(run.name for run in plan.runs)
  # One training that is measured in several ways has a file of results for each.
  names = {run: run.name if count[run.name] == 1 else f"{run.name}.{run.measurement}" for run in plan.runs}
  for (table, _), runs in plan.rows.items():
    check_protocols(table, runs, results, folder)
  tables = {}
  for table in plan.tables:
    rows = [(table.name, place) for place in range(len(table.rows))]
    figures = [{column.name: by_seed(plan, row, results, column) for column in columns} for row in rows]
    tables[table.name] = table_of(table, figures, [[names[run] for run in plan.rows[row]] for row in rows])
  return {
    "base": provenance.public(base),
    "provenance": result_files.together(
      record for run, measured in results.items() for record in _records(run, measured).values()
    ),
    "seeds": list(plan.seeds),
    "columns": {column.name: column.title for column in columns},
    "paper_columns": PAPER_METRICS,
    "tables": tables,
    "runs": {name: _run(run, results.get(run), folder, names) for run, name in names.items()},
  }


def read_results(plan: Plan, folder: Folder) -> dict[Run, Results | None]:
  """Return the results of each run that is measured; None where it is not finished."""
  return {run: folder.read(run) for run in plan.runs if run.evals}


def check_protocols(table: str, runs: Sequence[Run], results: Mapping[Run, Results | None], folder: Folder) -> None:
  """Check that the runs of a row, which differ by their seed, were measured alike. Raises UserError: two were not."""
  first: dict[tuple[str, str], tuple[Run, Any]] = {}
  for run in runs:
    for name, record in _records(run, results[run]).items():
      for field, value in record["protocol"].items():
        other, there = first.setdefault((name, field), (run, value))
        if field != "weights" and there != value:  # those say which model was measured
          # Measured again, other devices round a reference otherwise.
          remedy = f", or give --config.evals.{name}.reference=F.npz, one file for all runs" * (field == "reference")
          raise UserError(
            f"table {table} would mix protocols: {name} was measured with {field} {there!r} in"
            f" {folder.results(other)} and {value!r} in {folder.results(run)}; remove one of them, and measure it"
            f" again{remedy}"
          )


def table_of(table: Table, figures: Sequence[Figures], runs: Sequence[Sequence[str]]) -> dict[str, Any]:
  """Return the entry of a table in tables.json, given each row's figures and the names of its runs. `count` says how
  many differences have a p, how many are significant, and how many would be without Holm's correction and by chance."""
  cells = cells_of(figures, base=table.base)
  rows = [
    {
      "label": row.label,
      "changes": provenance.public(row.changes),
      "is_base": place == table.base,
      "runs": list(runs[place]),
      "cells": cells[place],
      "paper": dict(zip(PAPER_METRICS, row.paper, strict=True)) if row.paper else {},
    }
    for place, row in enumerate(table.rows)
  ]
  differences = [cell["difference"] for row in cells for cell in row.values() if cell["difference"]]
  tested = [difference for difference in differences if difference["p"] is not None]
  count = {
    "differences": len(tested),
    "significant": sum(difference["is_significant"] for difference in tested),
    "uncorrected": sum(difference["p"] < significance.ALPHA for difference in tested),
    "uncorrected_by_chance": significance.ALPHA * len(tested),
  }
  return {"title": table.title, "rows": rows, "count": count}


def cells_of(figures: Sequence[Figures], *, base: int | None) -> list[dict[str, dict[str, Any]]]:
  """Return, for each row, column -> cell: values, mean, sd (of a sample; None of one value), n; and `difference`, that
  to the row of number `base` over the seeds that both have, as `significance.Difference` with Holm's correction over
  all of these cells; None without a common seed, and in the base row."""
  pairs = {}
  for place, row in enumerate(figures):
    for name, values in row.items() if base is not None and place != base else ():
      # Paired by seed: runs of one seed see the same images in the same order, so that differences spread less.
      others = figures[base or 0][name]
      if common := [values[seed] - others[seed] for seed in values if seed in others]:
        pairs[place, name] = significance.paired(common)
  # All cells of a table together: whoever looks for bold ones looks at all of them.
  corrected = zip(pairs, significance.correct([*pairs.values()]), strict=True)
  differences = {cell: dataclasses.asdict(difference) for cell, difference in corrected}
  return [
    {name: {**_moments(values), "difference": differences.get((place, name))} for name, values in row.items()}
    for place, row in enumerate(figures)
  ]


def _moments(values: Mapping[int, float]) -> dict[str, Any]:
  numbers = [*values.values()]
  mean = statistics.fmean(numbers) if numbers else None
  sd = statistics.stdev(numbers) if len(numbers) > 1 else None
  return {"values": {str(seed): value for seed, value in values.items()}, "mean": mean, "sd": sd, "n": len(numbers)}


def by_seed(
  plan: Plan, row: tuple[str, int], results: Mapping[Run, Results | None], column: Column
) -> dict[int, float]:
  """Return seed -> figure, for the runs of a row that are finished and measure it. No mean has one that is not
  finite."""
  figures = {}
  for seed, run in zip(plan.seeds, plan.rows[row], strict=True):
    value = column.read(results[run] or {})
    if value is not None and math.isfinite(value):
      figures[seed] = value
    elif value is not None:
      logging.warning("%s: %s is %s, and is left out", run.name, column.name, value)
  return figures


def _run(run: Run, results: Results | None, folder: Folder, names: Mapping[Run, str]) -> dict[str, Any]:
  """Return the entry of a run. Its evaluations are None where it is not finished, a metric where it is not finite, and
  the minutes of its training steps where its workdir is gone."""
  records = result_files.as_written({run.name: _records(run, results)})[run.name]
  seconds = seconds_per_step(folder.workdir(run))
  return {
    "config": provenance.public(run.config),
    "start": names[run.start] if run.start else None,
    "minutes": None if seconds is None else seconds * run.config["num_steps"] / 60,
    "evaluations": {name: {key: record[key] for key in ("metrics", "protocol")} for name, record in records.items()}
    or None,
    "provenance": next((record["provenance"]["run"] for record in records.values() if "provenance" in record), None),
  }


def _records(run: Run, results: Results | None) -> dict[str, dict[str, Any]]:
  """Return data set -> the record of that evaluation; none of a run that is not finished."""
  return {name: results[section["task"]][name] for name, section in run.evals.items()} if results else {}


def markdown(summary: Mapping[str, Any]) -> str:
  """Return a section for each table: of each row the figures, the differences to the base row, and the paper's
  figures."""
  parts = [f"# Ablations of {summary['base']}, seeds {', '.join(map(str, summary['seeds']))}", NOTE]
  for name, table in summary["tables"].items():
    title = f"Table {name}: {table['title']}" if name.isdecimal() else table["title"]
    text = render_table(table, columns=summary["columns"], paper=summary["paper_columns"])
    parts.append(f"## {title}\n\n{text}")
  return "\n\n".join(parts) + "\n"


def render_table(table: Mapping[str, Any], *, columns: Mapping[str, str], paper: Mapping[str, str]) -> str:
  """Return a table of `table_of`, and below it how many differences are significant. `columns` and `paper`, the
  paper's figures, are name -> title."""
  # The paper's figures stand in the columns that measure the same; of those that nothing here measures, in their own.
  others = {name: f"{title} (paper)" for name, title in paper.items() if name not in columns}
  heads = ["", *columns.values(), *(others.values() if any(row["paper"] for row in table["rows"]) else ())]
  lines = [heads, ["---"] * len(heads)]
  for row in table["rows"]:
    lines += _rows(row, [*columns], [*others])
  text = "\n".join("| " + " | ".join((*line, *[BLANK] * (len(heads) - len(line)))) + " |" for line in lines)
  count = table["count"]
  if not count["differences"]:
    return text
  return (
    f"{text}\n\n{count['significant']} of {count['differences']} differences bold; chance alone makes any bold in at"
    f" most 5 % of such tables. Before Holm's correction {count['uncorrected']} have p < 0.05; chance gives"
    f" {count['uncorrected_by_chance']:.3g}."
  )


def _rows(row: Mapping[str, Any], columns: Sequence[str], others: Sequence[str]) -> list[list[str]]:
  label = f"**{row['label']}**" if row["is_base"] else row["label"]
  lines = [[label, *(_figure(row["cells"][name], len(row["runs"])) for name in columns)]]
  differences = [row["cells"][name]["difference"] for name in columns]
  if any(differences):
    lines.append(["− base", *(_difference(one) if one else BLANK for one in differences)])
  if row["paper"]:
    figures = [row["paper"].get(name) for name in (*columns, *others)]
    lines.append(["*paper*", *(BLANK if figure is None else f"{figure:z.2f}" for figure in figures)])
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
