"""Lay out the folder of an ablation, list the progress of its runs, and do them.

The folder holds base.json, runs/NAME/, results/NAME.HASH.json, logs/NAME.log, and the tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from diffdis_jax import config as run_config
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.common import buckets, files, signals
from diffdis_jax.errors import INTERRUPTED, PREEMPTED, Interrupted, Preempted, UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals.results import Results
from diffdis_jax.parallel import processes
from diffdis_jax.run import lock, provenance, workdir
from diffdis_jax.run.workdir import identity

PATIENCE = 10.0  # seconds between two looks at a run that another process has
BAD_INPUT = 2  # the exit code of a UserError


@dataclasses.dataclass(frozen=True)
class State:
  """The progress of a run."""

  step: int  # of its newest checkpoint
  num_steps: int
  measured: bool  # every evaluation has its result
  seconds: float | None  # of a step, where metrics.jsonl tells; without evaluations and saves

  @property
  def is_trained(self) -> bool:
    return self.step >= self.num_steps

  @property
  def is_finished(self) -> bool:
    return self.is_trained and self.measured

  @property
  def words(self) -> str:
    if self.is_trained:
      return "finished" if self.measured else "to measure"
    return f"step {self.step} of {self.num_steps}" if self.step else "missing"


class Folder:
  """Names the files under --out, which may be a bucket's address, and reads them."""

  def __init__(self, out: epath.PathLike):
    self.path = buckets.path(out)

  def workdir(self, run: Run) -> str:
    """Return the workdir of a run's training, absolute, so that `init_from` is the same wherever a command starts."""
    return str(buckets.absolute(self.path) / "runs" / run.name)

  def results(self, run: Run) -> str:
    """Return the file of its evaluations, as evaluate writes it."""
    # With a hash of how it was measured: another protocol writes another file, and costs no training.
    return str(self.path / "results" / f"{run.name}.{run.measurement}.json")

  def log(self, run: Run) -> epath.Path:
    """Return the log of a run's process."""
    return self.path / "logs" / f"{run.name}.log"

  def config(self, run: Run) -> dict[str, Any]:
    """Return the config of a run's training, with the workdir that it starts from, or, where it has a checkpoint, that
    it began from, since the folder may have moved."""
    if run.start is None:
      return run.config
    # Not in the plan's config: a path would make the run's hash, and so its name, depend on the folder.
    path = buckets.path(self.workdir(run))
    began = files.read_object(path / "config.json").get("init_from") if workdir.latest_step(path) else None
    return run.config | {"init_from": began or self.workdir(run.start)}

  def read(self, run: Run) -> Results | None:
    """Return its results, if every evaluation has one. Raises UserError: the file holds something else."""
    path = self.results(run)
    results = result_files.read(path) if buckets.path(path).exists() else {}
    # They are written one by one: a file with some of them is of a run that was stopped.
    whole = all(name in results.get(section["task"], {}) for name, section in run.evals.items())
    return results if whole else None

  def state(self, run: Run) -> State:
    """Return the progress of a run. One that has its results was trained to its end, though its workdir may be gone."""
    measured, num_steps, path = self.read(run) is not None, run.config["num_steps"], self.workdir(run)
    step = num_steps if run.evals and measured else workdir.latest_step(path) or 0
    return State(step, num_steps, measured, seconds_per_step(path))

  def check(self, plan: Plan) -> None:
    """Check that the folder's runs are of the same base. Raises UserError where they are of another."""
    file = self.path / "base.json"
    names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
    if file.name not in names:
      # Tasks of an array begin at one moment: another one may be writing the file.
      if any(not name.startswith(f".{file.name}.") for name in names):
        raise UserError(f"--out={self.path} is not empty and holds no ablations (no base.json); take a new folder")
      return
    there = files.read_object(file)
    if workdir.SECTIONS - there.keys():
      raise UserError(f"{file} is no base of ablations; take a new --out")
    # By what the numbers depend on: how often a run logs or saves may change between two calls.
    if differing := workdir.differences(identity(there), identity(plan.base)):
      raise UserError(
        f"--out={self.path} holds ablations of another base: {', '.join(differing)}; take its base or a new --out"
      )

  def open(self, plan: Plan) -> None:
    """Create it with its base, or check that it has the same. Raises UserError: it has another, or is no folder."""
    self.check(plan)
    with files.writing(f"to --out={self.path}"):
      self.path.mkdir(parents=True, exist_ok=True)
      files.write_json(self.path / "base.json", plan.base)


def to_do(plan: Plan, states: Mapping[Run, State]) -> set[Run]:
  """Return the runs of a plan that are left: rows that are not finished, and what these start from."""
  wanted: set[Run] = set()
  for run in (run for runs in plan.rows.values() for run in runs):
    while run is not None and not states[run].is_finished:
      wanted.add(run)
      run = run.start
  return wanted


def seconds_per_step(path: str) -> float | None:
  """Return the mean over the lines of a workdir's metrics.jsonl; None without a speed."""
  lines = files.lines(buckets.path(path) / "metrics.jsonl")
  speeds = [line.get("steps_per_sec") for line in provenance.metrics_of(lines)]
  # Times of equally many steps have a mean; the mean of speeds would favour the fast ones.
  seconds = [1 / speed for speed in speeds if speed]
  return sum(seconds) / len(seconds) if seconds else None


def lines(plan: Plan, folder: Folder) -> list[str]:
  """Return a line for each run, by the number that --only takes; then which runs a row has, and the hours in all."""
  states = {run: folder.state(run) for run in plan.runs}
  hours = {run: _hours(run, states) for run in plan.runs}
  width, shown = max(len(run.name) for run in plan.runs), []
  for number, (run, state) in enumerate(states.items()):
    left = "" if state.is_trained else "? h" if hours[run] is None else f"{hours[run]:.2f} h"
    shown.append(f"{number:4d}  {run.name:{width}}  {state.words:>20}  {left:>8}")
  shown.append("")
  for table in plan.tables:
    for place, row in enumerate(table.rows):
      numbers = ", ".join(str(plan.runs.index(run)) for run in plan.rows[table.name, place])
      shown.append(f"table {table.name}, {row.label}: runs {numbers}")
  wanted = to_do(plan, states)
  known = [known for run in wanted if (known := hours[run]) is not None]
  text = f"{len(plan.runs)} runs, {len(plan.runs) - len(wanted)} finished"
  if wanted:
    text += f"; {math.fsum(known):.2f} hours of steps left, without starts and evaluations"
  if unknown := len(wanted) - len(known):
    text += f", and {unknown} runs whose speed is known when they have steps"
  return [*shown, "", text]


def _hours(run: Run, states: Mapping[Run, State]) -> float | None:
  """Return the hours of steps that a run has left, by its own speed or that of runs with the same objectives."""
  alike = [state for other, state in states.items() if other.config["objectives"] == run.config["objectives"]]
  known, state = [other.seconds for other in alike if other.seconds is not None], states[run]
  left = max(state.num_steps - state.step, 0)
  return left * (state.seconds or statistics.median(known)) / 3600 if known else None


def run(
  one: Run, folder: Folder, *, train: Callable[[run_config.Run, str], Any], measure: Callable[[Run, str, str], Any]
) -> None:
  """Train a run, what it starts from first, and measure it, each from where it was stopped or when another process has
  ended it. `train` takes a record and a workdir; `measure` a run, its workdir, and the file of results to write."""
  # Before its start: where the results are, no workdir has to be.
  if as_first_sees(lambda: folder.state(one).is_finished):
    return
  # The start first: a run begins from its last checkpoint.
  if one.start:
    run(one.start, folder, train=train, measure=measure)
  path = folder.workdir(one)
  _when_free(lambda: folder.state(one).is_trained, lambda: train(run_config.Run.of(folder.config(one)), path))

  def measured() -> None:
    # Training locks the workdir itself; measuring needs the same lock, or two processes would write one file.
    with contextlib.ExitStack() as stack:
      processes.on_first(lambda: stack.enter_context(lock.Lock(path)))
      measure(one, path, folder.results(one))

  _when_free(lambda: folder.state(one).measured, measured)


def _when_free(is_done: Callable[[], bool], action: Callable[[], Any]) -> None:
  """Do it, unless it is done; while another process has the workdir, wait for it."""
  while not as_first_sees(is_done):
    try:
      return action()
    except lock.InUse as error:
      # One of several processes cannot wait alone: the others are on their way to what all of them do together.
      if jax.process_count() > 1:
        raise
      logging.info("waiting: %s", error)
      time.sleep(PATIENCE)


def as_first_sees(look: Callable[[], bool]) -> bool:
  """Return on every process what process 0 sees: a shared file system may show a new file to some processes later."""
  return bool(processes.from_first(np.uint8(look() if processes.is_first() else False)))


def run_all(plan: Plan, folder: Folder, command: Callable[[int], list[str]]) -> int:
  """Do the runs that are not finished, starts first, each by its `command` in a process whose output goes to its log.
  One that fails is reported, and the others continue. Return 0, or 2 if each that failed had bad input, else 1.

  Raises Preempted: SIGTERM or, as Interrupted, Ctrl-C came, to this process or to a run's, which has saved and ended.
  """
  failed: dict[str, int] = {}
  states = {run: folder.state(run) for run in plan.runs}
  wanted = to_do(plan, states)
  for number, one in enumerate(plan.runs):
    if one not in wanted:
      continue
    log = folder.log(one)
    if one.start and one.start.name in failed:
      logging.error("run %d, %s: left out, since its start %s failed", number, one.name, one.start.name)
      # With its code: where the start's input was bad, this run needs no other cause.
      failed[one.name] = failed[one.start.name]
      continue
    logging.info("run %d of 0 to %d: %s; %s; log in %s", number, len(plan.runs) - 1, one.name, states[one].words, log)
    if code := call(command(number), log):
      failed[one.name] = code
      logging.error("run %d, %s: failed with code %d: %s; log in %s", number, one.name, code, last_words(log), log)
  if failed:
    logging.error("%d of %d runs failed; the same command tries them again", len(failed), len(plan.runs))
    return BAD_INPUT if {*failed.values()} == {BAD_INPUT} else 1
  logging.info("all %d runs are finished", len(plan.runs))
  return 0


def call(command: Sequence[str], log: epath.Path) -> int:
  """Return the exit code of a process, whose output is appended to the file `log`. Raises Preempted: it was stopped, or
  this process was, and it has saved; Interrupted, if by Ctrl-C."""
  with buckets.appended(log) as out:
    # Without a standard input: a run does not read a terminal.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
      code = process.wait()
    except KeyboardInterrupt as stopped:
      process.terminate()  # on which it saves
      if not isinstance(stopped, signals.Terminated):
        signals.say("interrupted: what runs saves and ends; a second Ctrl-C ends it at once, without a save")
      process.wait()
      raise (Preempted if isinstance(stopped, signals.Terminated) else Interrupted) from None
  if code in (INTERRUPTED, PREEMPTED):
    raise Interrupted if code == INTERRUPTED else Preempted
  return code


def last_words(log: epath.Path) -> str:
  """Return the last line of a log that says what was wrong."""
  written = [line for line in files.lines(log) if line.strip()]
  errors = [line for line in written if line.startswith("error: ")]
  return (errors or written or ["it wrote nothing"])[-1].removeprefix("error: ")
