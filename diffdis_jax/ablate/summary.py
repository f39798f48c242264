"""Summarise the figures of tables: mean, spread and number over seeds, and paired differences to the base row."""

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
from diffdis_jax.ablate.run import Folder
from diffdis_jax.ablate.tables import PAPER_METRICS, Column, Table, columns_of, measured
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals.results import Results
from diffdis_jax.run import provenance

Figures = Mapping[str, Mapping[int, float]]  # of a row: column -> seed -> figure


def summarise(plan: Plan, folder: Folder, *, base: str) -> dict[str, Any]:
  """Return the content of tables.json for the runs that are finished; the same for the same results.

  `base` is how the base config was named. Raises UserError: results that are none, or two of one row by different
  protocols.
  """
  of_rows = (run.evals for runs in plan.rows.values() for run in runs)
  columns = measured(columns_of(plan.base["evals"]), of_rows)
  results = read_results(plan, folder)
  count = collections.Counter(run.name for run in plan.runs)
  # One training that is measured in several ways has a file of results for each.
  names = {run: run.name if count[run.name] == 1 else f"{run.name}.{run.measurement}" for run in plan.runs}
  for (table, _), runs in plan.rows.items():
    check_protocols(table, runs, results, folder)
  return {
    "base": provenance.public(base),
    "provenance": provenance.together(
      record for run, found in results.items() if found is not None for record in _records(run, found).values()
    ),
    "seeds": list(plan.seeds),
    "columns": {column.name: column.title for column in columns},
    "paper_columns": PAPER_METRICS,
    "tables": {table.name: _table(plan, table, results, columns, names) for table in plan.tables},
    "runs": {name: _run(run, results.get(run), folder, names) for run, name in names.items()},
  }


def read_results(plan: Plan, folder: Folder) -> dict[Run, Results | None]:
  """Return the results of each run that is measured; None where it is not finished."""
  return {run: folder.read(run) for run in plan.runs if run.evals}


def check_protocols(table: str, runs: Sequence[Run], results: Mapping[Run, Results | None], folder: Folder) -> None:
  """Check that the runs of a row, which differ by their seed, were measured alike. Raises UserError: two were not."""
  first: dict[tuple[str, str], tuple[Run, Any]] = {}
  for run in runs:
    for name, record in _records(run, results[run]).items() if results[run] is not None else ():
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
  """Return the entry of a table in tables.json.

  Args:
    table: title, rows and which row is the base.
    figures: of each row.
    runs: names of each row's runs, all of them, finished or not.

  Returns:
    title; rows, of which each cell is as `cells_of` gives it; and `count`, how many differences have a p, how many of
    them are significant, and how many would be without Holm's correction, truly and by chance.
  """
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
  tested = [cell["difference"] for row in cells for cell in row.values() if cell["difference"]]
  tested = [each for each in tested if each["p"] is not None]
  count = {
    "differences": len(tested),
    "significant": sum(each["is_significant"] for each in tested),
    "uncorrected": sum(each["p"] < significance.ALPHA for each in tested),
    "uncorrected_by_chance": significance.ALPHA * len(tested),
  }
  return {"title": table.title, "rows": rows, "count": count}


def cells_of(figures: Sequence[Figures], *, base: int | None) -> list[dict[str, dict[str, Any]]]:
  """Return, for each row, column -> cell.

  Args:
    figures: of each row.
    base: the number of the row that the others are compared with; None for no comparison.

  Returns:
    Cells of values, mean, sd (of a sample; None of one value), n; and `difference`, that to the base row over the seeds
    that both have, as `significance.Difference` with Holm's correction over all of these cells; None without a common
    seed, and in the base row.
  """
  places, pairs = [], []
  for place, row in enumerate(figures):
    for name, values in row.items():
      if base is None or place == base:
        continue
      # Paired by seed: runs of one seed see the same images in the same order, so that differences spread less.
      others = figures[base][name]
      common = [values[seed] - others[seed] for seed in values if seed in others]
      if common:
        places.append((place, name))
        pairs.append(common)
  # All cells of a table together: whoever looks for bold ones looks at all of them.
  found = significance.correct([significance.paired(each) for each in pairs])
  differences = {place: dataclasses.asdict(each) for place, each in zip(places, found, strict=True)}
  return [
    {name: {**_moments(values), "difference": differences.get((place, name))} for name, values in row.items()}
    for place, row in enumerate(figures)
  ]


def _moments(values: Mapping[int, float]) -> dict[str, Any]:
  numbers = [*values.values()]
  mean = statistics.fmean(numbers) if numbers else None
  sd = statistics.stdev(numbers) if len(numbers) > 1 else None
  return {"values": {str(seed): value for seed, value in values.items()}, "mean": mean, "sd": sd, "n": len(numbers)}


def _table(
  plan: Plan,
  table: Table,
  results: Mapping[Run, Results | None],
  columns: Sequence[Column],
  names: Mapping[Run, str],
) -> dict[str, Any]:
  rows = [(table.name, place) for place in range(len(table.rows))]
  figures = [{column.name: by_seed(plan, row, results, column) for column in columns} for row in rows]
  return table_of(table, figures, [[names[run] for run in plan.rows[row]] for row in rows])


def by_seed(
  plan: Plan, row: tuple[str, int], results: Mapping[Run, Results | None], column: Column
) -> dict[int, float]:
  """Return seed -> figure, for the runs of a row that are finished and measure it. No mean has one that is not
  finite."""
  found = {}
  for seed, run in zip(plan.seeds, plan.rows[row], strict=True):
    value = column.read(results[run] or {})
    if value is not None and math.isfinite(value):
      found[seed] = value
    elif value is not None:
      logging.warning("%s: %s is %s, and is left out", run.name, column.name, value)
  return found


def _run(run: Run, results: Results | None, folder: Folder, names: Mapping[Run, str]) -> dict[str, Any]:
  """Return the entry of a run: its config, and the metrics and protocols of its evaluations, None where it is not
  finished. A metric that is not finite is None.

  `minutes` are those of its own training steps, None where its workdir is gone.
  `provenance` is the run's own, with what it began from; None in results that have none.
  """
  evaluations = origin = None
  if results is not None:
    records = _records(run, results)
    finite = result_files.as_written({run.name: records})[run.name]
    evaluations = {name: {key: record[key] for key in ("metrics", "protocol")} for name, record in finite.items()}
    origin = next((record["provenance"]["run"] for record in records.values() if "provenance" in record), None)
  return {
    "config": provenance.public(run.config),
    "start": names[run.start] if run.start else None,
    "minutes": folder.minutes(run),
    "evaluations": evaluations,
    "provenance": origin,
  }


def _records(run: Run, results: Results) -> dict[str, dict[str, Any]]:
  """Return data set -> the record of that evaluation."""
  return {name: results[section["task"]][name] for name, section in run.evals.items()}
