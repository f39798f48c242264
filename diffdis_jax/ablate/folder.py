"""The folder of an ablation: base.json, runs/NAME/, results/NAME.HASH.json, logs/NAME.log, and the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals.results import Results
from diffdis_jax.run import provenance, workdir
from diffdis_jax.run.workdir import identity


@dataclasses.dataclass(frozen=True)
class State:
  """The progress of a run.

  Attributes:
    step: of its newest checkpoint.
    num_steps: at which it is trained.
    measured: whether every evaluation has its result.
    seconds: of a step, where metrics.jsonl tells; without evaluations and saves.
  """

  step: int
  num_steps: int
  measured: bool
  seconds: float | None

  @property
  def is_trained(self) -> bool:
    """Return whether its last step is saved."""
    return self.step >= self.num_steps

  @property
  def is_finished(self) -> bool:
    """Return whether there is nothing left to do."""
    return self.is_trained and self.measured

  @property
  def words(self) -> str:
    """Describe the progress for people."""
    if self.is_finished:
      return "finished"
    if self.is_trained:
      return "to measure"
    return f"step {self.step} of {self.num_steps}" if self.step else "missing"


def to_do(plan: Plan, states: Mapping[Run, State]) -> set[Run]:
  """Return the runs of a plan that are left: rows that are not finished, and what these start from. A start has no
  results of its own, so that it is not missed where those of all its rows are there."""
  found: set[Run] = set()
  for run in {run for runs in plan.rows.values() for run in runs}:
    each: Run | None = run
    while each is not None and not states[each].is_finished:
      found.add(each)
      each = each.start
  return found


class Folder:
  """The layout of the files under --out, which may be a bucket's address."""

  def __init__(self, out: epath.PathLike):
    self.path = buckets.path(out)

  def workdir(self, run: Run) -> str:
    """Return the workdir of a run's training. It is absolute, so that `init_from` is the same from wherever a command
    is started."""
    return str(buckets.absolute(self.path) / "runs" / run.name)

  def results(self, run: Run) -> str:
    """Return the file of its evaluations, as evaluate writes it."""
    # With a hash of how it was measured: another protocol writes another file, and costs no training.
    return str(self.path / "results" / f"{run.name}.{run.measurement}.json")

  def log(self, run: Run) -> epath.Path:
    """Return the log of a run's process."""
    return self.path / "logs" / f"{run.name}.log"

  def config(self, run: Run) -> dict[str, Any]:
    """Return the config of a run's training. Its `init_from` is the workdir of what it starts from, if there is one; in
    a run that has a checkpoint it is the one from which the run began, since the folder may have moved."""
    if run.start is None:
      return run.config
    # Not in the plan's config: a path would make the run's hash, and so its name, depend on the folder.
    path = buckets.path(self.workdir(run))
    began = files.read_object(path / "config.json").get("init_from") if workdir.latest_step(path) else None
    return run.config | {"init_from": began or self.workdir(run.start)}

  def read(self, run: Run) -> Results | None:
    """Return its results, if every evaluation has one. Raises UserError: the file holds something else."""
    path = self.results(run)
    found = result_files.read(path) if buckets.path(path).exists() else {}
    # They are written one by one: a file with some of them is of a run that was stopped.
    whole = all(name in found.get(section["task"], {}) for name, section in run.evals.items())
    return found if whole else None

  def state(self, run: Run) -> State:
    """Return the progress of a run. A run that has its results was trained to its end, also where its workdir was
    removed since."""
    measured, num_steps = self.read(run) is not None, run.config["num_steps"]
    step = num_steps if run.evals and measured else workdir.latest_step(self.workdir(run)) or 0
    return State(
      step=step,
      num_steps=num_steps,
      measured=measured,
      seconds=seconds_per_step(buckets.path(self.workdir(run))),
    )

  def minutes(self, run: Run) -> float | None:
    """Return the minutes of its training steps, without starts, evaluations and saves; None where metrics.jsonl does
    not tell."""
    seconds = seconds_per_step(buckets.path(self.workdir(run)))
    return None if seconds is None else seconds * run.config["num_steps"] / 60

  def check(self, plan: Plan) -> None:
    """Check that the folder's runs are of the same base. Raises UserError where they are of another."""
    file = self.path / "base.json"
    if not file.exists():
      names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set[str]()
      # Tasks of an array begin at one moment: another one may be writing the file, or have written it just now.
      if file.name not in names:
        # A folder of something else is left as it is.
        if any(not name.startswith(f".{file.name}.") for name in names):
          raise UserError(f"--out={self.path} is not empty and holds no ablations (no base.json); take a new folder")
        return
    try:
      there = files.read_json(file)
    except UserError as error:
      raise UserError(f"{error}; take a new --out") from error
    if not isinstance(there, dict) or workdir.SECTIONS - there.keys():
      raise UserError(f"{file} is no base of ablations; take a new --out")
    # By what the numbers depend on: how often a run logs or saves may change between two calls.
    if differing := workdir.differences(identity(there), identity(_without_seed(plan.base))):
      raise UserError(
        f"--out={self.path} holds ablations of another base: {', '.join(differing)}; take its base or a new --out"
      )

  def open(self, plan: Plan) -> None:
    """Create it with its base, or check that it has the same. Raises UserError: it has another, or is no folder."""
    self.check(plan)
    with files.writing(f"to --out={self.path}"):
      self.path.mkdir(parents=True, exist_ok=True)
      if not buckets.is_url(self.path):
        files.sweep(self.path)
        files.sweep(self.path / "results")
      files.write_json(self.path / "base.json", _without_seed(plan.base))


def seconds_per_step(path: epath.Path) -> float | None:
  """Return the mean over the lines of a workdir's metrics.jsonl, which stand for equally many steps; None without a
  speed."""
  speeds = [line.get("steps_per_sec") for line in provenance.metrics_of(files.lines(path / "metrics.jsonl"))]
  # Times of equally many steps have a mean; the mean of speeds would favour the fast ones.
  seconds = [1 / speed for speed in speeds if speed]
  return sum(seconds) / len(seconds) if seconds else None


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
  # --seeds may grow later: rows of more seeds belong to the same ablation.
  return {field: value for field, value in config.items() if field != "seed"}
