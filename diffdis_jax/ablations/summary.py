"""Tables of figures: mean, spread and number over seeds, and paired differences to the base row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffdis_jax.ablations.columns import Column
from diffdis_jax.ablations.folder import Folder
from diffdis_jax.ablations.plan import Plan, Run
from diffdis_jax.ablations.tables import PAPER_METRICS, Row, Table
from diffdis_jax.errors import UserError
from diffdis_jax.evals.results import Results, differences
from diffdis_jax.run import provenance

# What of a protocol follows from a field that rows may change; else it is the field's own last name.
FOLLOWS = {
  "num_steps": "checkpoint",
  "text_diffusion.target": "unit_query",  # queries of the target `noise` have no length of their own
  "inference.generation_steps": "steps",
  "inference.generation_guidance": "guidance",
}


def summarise(plan: Plan, folder: Folder, columns: Sequence[Column], *, base: str) -> dict[str, Any]:
  """What tables.json holds, of the runs that are finished; the same for the same results.

  Args:
    plan: tables and their runs.
    folder: of the ablation.
    columns: of every table.
    base: how the base config was named.

  Raises:
    UserError: results that are none, or two of one table by different protocols.
  """
  results = {run: folder.read(run) for run in plan.runs if run.evals}
  for table in plan.tables:
    check_protocols(table, {run: results[run] for run in runs_of(plan, table)}, folder)
  return {
    "base": provenance.public(base),
    "provenance": provenance.together(
      record for run, found in results.items() if found is not None for record in _records(run, found).values()
    ),
    "seeds": list(plan.seeds),
    "columns": {column.name: column.title for column in columns},
    "paper_columns": PAPER_METRICS,
    "tables": {table.name: _table(plan, table, results, columns) for table in plan.tables},
    "runs": {run.name: _run(run, results.get(run)) for run in plan.runs},
  }


def runs_of(plan: Plan, table: Table) -> list[Run]:
  """The runs of a table, each once."""
  return [*dict.fromkeys(run for place in range(len(table.rows)) for run in plan.rows[table.name, place])]


def check_protocols(table: Table, results: Mapping[Run, Results | None], folder: Folder) -> None:
  """Raises UserError where two runs of a table were measured differently, but for what its rows change themselves."""
  changed = {field for row in table.rows for field in row.changes}
  ignored = {"weights", *(FOLLOWS.get(field, field.split(".")[-1]) for field in changed)}
  first: dict[tuple[str, str], tuple[Run, Mapping[str, Any]]] = {}
  for run, found in results.items():
    for name, section in run.evals.items() if found is not None else ():
      protocol = found[section["task"]][name]["protocol"] if found else {}
      other, theirs = first.setdefault((section["task"], name), (run, protocol))
      if different := differences([theirs, protocol], ignored=ignored):
        field, (there, here) = next(iter(different.items()))
        raise UserError(
          f"table {table.name} would mix protocols: {name} was measured with {field} {there!r} in"
          f" {folder.results(other)} and {here!r} in {folder.results(run)}; remove one of them, and measure it again"
        )


def cell(values: Mapping[int, float], base: Mapping[int, float] | None) -> dict[str, Any]:
  """The figure of a row.

  Args:
    values: seed -> figure.
    base: those of the base row; None where this is it.

  Returns:
    mean, sd (of a sample; None of one value), n; and `difference`, None without a common seed: the mean difference to
    the base row over the seeds that both have, its standard error (None of one), n, and whether it is within noise,
    smaller than two standard errors (None where there is no standard error).
  """
  found: dict[str, Any] = {"values": {str(seed): value for seed, value in values.items()}, **_moments(values.values())}
  pairs = [values[seed] - base[seed] for seed in values if seed in base] if base is not None else []
  found["difference"] = _difference(pairs) if pairs else None
  return found


def _moments(values: Iterable[float]) -> dict[str, Any]:
  numbers = [*values]
  mean = statistics.fmean(numbers) if numbers else None
  return {"mean": mean, "sd": statistics.stdev(numbers) if len(numbers) > 1 else None, "n": len(numbers)}


def _difference(pairs: Sequence[float]) -> dict[str, Any]:
  moments = _moments(pairs)
  error = None if moments["sd"] is None else moments["sd"] / math.sqrt(moments["n"])
  within = None if error is None else moments["mean"] == 0 or abs(moments["mean"]) < 2 * error
  return {"mean": moments["mean"], "se": error, "n": moments["n"], "within_noise": within}


def _table(
  plan: Plan, table: Table, results: Mapping[Run, Results | None], columns: Sequence[Column]
) -> dict[str, Any]:
  figures = [_figures(plan, table, place, results, columns) for place in range(len(table.rows))]
  rows = []
  for place, row in enumerate(table.rows):
    is_base = place == table.base
    against = {} if is_base else figures[table.base]
    cells = {name: cell(values, against.get(name)) for name, values in figures[place].items()}
    rows.append(_row(row, cells, is_base=is_base, runs=[run.name for run in plan.rows[table.name, place]]))
  return {"title": table.title, "rows": rows}


def _figures(
  plan: Plan, table: Table, place: int, results: Mapping[Run, Results | None], columns: Sequence[Column]
) -> dict[str, dict[int, float]]:
  """Column -> seed -> figure, of the runs of a row that are finished and measure it."""
  found: dict[str, dict[int, float]] = {column.name: {} for column in columns}
  for seed, run in zip(plan.seeds, plan.rows[table.name, place], strict=True):
    for column in columns:
      value = column.read(results[run] or {})
      if value is not None:
        found[column.name][seed] = value
  return found


def _row(row: Row, cells: Mapping[str, Any], *, is_base: bool, runs: Sequence[str]) -> dict[str, Any]:
  paper = dict(zip(PAPER_METRICS, row.paper, strict=True)) if row.paper else {}
  return {
    "label": row.label,
    "changes": dict(row.changes),
    "is_base": is_base,
    "runs": list(runs),
    "cells": dict(cells),
    "paper": paper,
  }


def _run(run: Run, results: Results | None) -> dict[str, Any]:
  """Of a run: its config, and the metrics and protocols of its evaluations, None where it is not finished.

  `provenance` is the run's own, with what it began from; None in results of an earlier version.
  """
  measured: dict[str, Any] | None = None
  origin: dict[str, Any] | None = None
  if results is not None:
    records = _records(run, results)
    measured = {name: {key: record[key] for key in ("metrics", "protocol")} for name, record in records.items()}
    origin = next((record["provenance"]["run"] for record in records.values() if "provenance" in record), None)
  return {
    "config": provenance.public(run.config),
    "autoencoder": run.autoencoder.name if run.autoencoder else None,
    "evaluations": measured,
    "provenance": origin,
  }


def _records(run: Run, results: Results) -> dict[str, dict[str, Any]]:
  """Data set -> the record of that evaluation."""
  return {name: results[section["task"]][name] for name, section in run.evals.items()}
