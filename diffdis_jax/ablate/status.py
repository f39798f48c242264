"""List which runs of a plan are there, which are missing, and how long these should take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.ablate.folder import Folder, State, to_do
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.config.objectives import task_of


def lines(plan: Plan, folder: Folder, step_seconds: float | None) -> list[str]:
  """Return a line for each run, by the number that --only takes; then which runs a row has, and the hours in all.

  Args:
    plan: the runs.
    folder: where they are done.
    step_seconds: of a training step, where no run with the same objectives tells; None where that is not known.
  """
  states = {run: folder.state(run) for run in plan.runs}
  seconds = {run: _seconds(run, states, step_seconds) for run in plan.runs}
  width = max(len(run.name) for run in plan.runs)
  found = [
    f"{number:4d}  {run.name:{width}}  {states[run].words:>20}  {_hours(states[run], seconds[run]):>8}"
    for number, run in enumerate(plan.runs)
  ]
  found += ["", *_rows(plan), ""]
  wanted = to_do(plan, states)
  left = [run for run in plan.runs if run in wanted]
  known = [_steps(states[run]) * each / 3600 for run in left if (each := seconds[run]) is not None]
  said = f"{sum(known):.2f} hours of steps left, without starts and evaluations"
  if unknown := len(left) - len(known):
    said += f", and {unknown} runs whose speed is known when they have steps, or by --step_seconds"
  counts = f"{len(plan.runs)} runs, {len(plan.runs) - len(left)} finished"
  return [*found, f"{counts}; {said}" if left else counts]


def _rows(plan: Plan) -> list[str]:
  numbers = {run: number for number, run in enumerate(plan.runs)}
  return [
    f"table {table.name}, {row.label}: runs {', '.join(str(numbers[run]) for run in plan.rows[table.name, place])}"
    for table in plan.tables
    for place, row in enumerate(table.rows)
  ]


def _seconds(run: Run, states: Mapping[Run, State], step_seconds: float | None) -> float | None:
  """Return the seconds of a step: the run's own, or the median of those with the same objectives, or what was given for
  all but autoencoders."""
  # Runs of the same objectives take about as long a step; an autoencoder takes another.
  alike: Sequence[Any] = [
    state.seconds for other, state in states.items() if other.config["objectives"] == run.config["objectives"]
  ]
  measured = [seconds for seconds in alike if seconds is not None]
  if states[run].seconds is not None:
    return states[run].seconds
  if measured:
    return statistics.median(measured)
  return None if task_of(run.config["objectives"]).is_autoencoder else step_seconds


def _steps(state: State) -> int:
  return max(state.num_steps - state.step, 0)


def _hours(state: State, seconds: float | None) -> str:
  if state.is_trained:
    return ""
  return "? h" if seconds is None else f"{_steps(state) * seconds / 3600:.2f} h"
