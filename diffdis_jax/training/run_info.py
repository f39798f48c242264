"""Log and record a run at its start and at its end."""

from __future__ import annotations

import json
import math
import shlex
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview

from diffdis_jax.common import buckets, machine
from diffdis_jax.config.run import Run
from diffdis_jax.data.build import describe, doubts
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes
from diffdis_jax.run import checkpoint, digests, provenance, workdir
from diffdis_jax.training import optim
from diffdis_jax.training.step import Trainer


def parameter_groups(trainer: Trainer) -> dict[str, dict[str, int]]:
  """Count the parameters by group of the optimizer and part of the network."""
  sizes: dict[str, Counter[str]] = {}
  for path, group in trainer.groups.items():
    sizes.setdefault(group, Counter())[path.split(".")[0]] += math.prod(trainer.shapes[path].shape)
  return {group: dict(parts) for group, parts in sizes.items()}


def of_start(trainer: Trainer, *, begins: bool) -> dict[str, Any]:
  """Return the values that history.jsonl keeps of a start.

  Args:
    trainer: of the run.
    begins: whether the run is new; otherwise it resumes.
  """
  return {
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "device_kind": jax.devices()[0].device_kind,
    "processors": machine.processors(),  # a CPU's sums are split by them, and round otherwise
    "host": socket.gethostname(),
    "jax": jax.__version__,
    **provenance.code(),
    # A resumed run has its parameters from its own checkpoint.
    **({"init_from": provenance.behind(trainer.run.init_from)} if begins else {}),
    "mesh": dict(trainer.mesh.shape),
    "num_steps": trainer.run.num_steps,  # which a later start may raise
    "parameters": parameter_groups(trainer),
    "data": describe(trainer.run.data),
    "data_digests": digests_of(trainer.run),
  }


def digests_of(run: Run) -> dict[str, str]:
  """Return, by the field of their path, such as `data.path`, the digests of the prepared data's records."""
  paths = {
    "data.path" if name == "data" else f"data.mixture.{name}.path": section.get("path")
    for name, section in run.data.sources.items()
  }
  return _digests(paths)


def _digests(paths: Mapping[str, Any]) -> dict[str, str]:
  """Return the digests of those paths where prepared data lie."""
  found = {field: digests.fingerprint(str(path), part=digests.RECORDS) for field, path in paths.items() if path}
  return {field: digest for field, digest in found.items() if digest}


def moved(run: Run, path: str) -> set[str]:
  """Return the fields of paths where a copy of the data lies that the run in this workdir had at its last start."""
  before = _last(path, "data_digests") or {}
  return {field for field, digest in digests_of(run).items() if before.get(field) == digest}


def _last(path: str, name: str) -> Any:
  """Return this value of the run's newest event that has it; None where none has."""
  return next((event[name] for event in reversed(provenance.read(path)) if name in event), None)


def check_same_on_all(run: Run) -> None:
  """Raise UserError, on every process, where some hosts have other data, another config or other code than host 0.

  Each would take its rows out of an order of its own, or start from its own parameters, or wait in vain for a program
  that the others do not run.
  """
  if jax.process_count() == 1:
    return
  measured = {f"evals.{name}.data.path": (run.evals[name].get("data") or {}).get("path") for name in run.train_evals}
  known = digests_of(run) | _digests(measured)
  lines = [*describe(run.data), *(f"{field}: {digest}" for field, digest in known.items())]
  if hosts := processes.differing("\n".join(lines)):
    raise UserError(
      f"these hosts have other data than host 0: {', '.join(map(str, hosts))}; here it is {'; '.join(lines)}; copy the"
      " same to every host"
    )
  fields = {**workdir.flatten(run.to_dict()), **provenance.code()}
  text = json.dumps(fields, sort_keys=True)
  if processes.differing(text):
    mine, first = json.loads(text), json.loads(processes.texts(text)[0])
    name = next((name for name in (*first, *mine) if repr(first.get(name)) != repr(mine.get(name))), "")
    here = f"{name} is {first.get(name)!r} on host 0 and {mine.get(name)!r} on host {jax.process_index()}"
    said = processes.first_message(here if name else "")
    raise UserError(f"{said}; start the same command, with the same code and packages, on every host")


def log_changes(run: Run, path: str, *, before: int | None, step: int) -> None:
  """Log what differs from the last start of a run that resumes at this step.

  Args:
    before: its number of steps before it was made longer; None where it was not.
  """
  if before is not None:
    _log_longer(run, before, step)
  if step and processes.is_first():
    _warn_of_other_data(run, path)
    _warn_of_other_processors(path)


def _warn_of_other_data(run: Run, path: str) -> None:
  """Warn where a run that resumes has other data than at its last start, such as a folder that was prepared again."""
  now, before = describe(run.data), _last(path, "data")
  digests_now = digests_of(run)
  digests_before = _last(path, "data_digests") or digests_now
  is_known = len(digests_now) == len(run.data.sources)  # then it does not matter where they lie
  if before is None or (digests_now == digests_before and (is_known or now == before)):
    return
  logging.warning(
    "the data have changed since the last start: %s then, %s now; from here on the order of records is another one, and"
    " the numbers are not those of one set of data",
    "; ".join([*map(str, before), *digests_before.values()]),
    "; ".join([*now, *digests_now.values()]),
  )


def _warn_of_other_processors(path: str) -> None:
  """Warn when a run resumes on a CPU with another number of processors, by which a CPU splits its sums."""
  now, before = machine.processors(), _last(path, "processors")
  if jax.default_backend() == "cpu" and before not in (None, now):
    logging.warning(
      "the run resumes on %d processors, and had %d before: its numbers from here on differ by rounding", now, before
    )


def _log_longer(run: Run, before: int, step: int) -> None:
  """Log how the learning rates change where a run of `before` steps gets longer at this step."""
  rate = lambda num_steps, group: float(np.asarray(optim.rate_schedule(run.optim, group, num_steps=num_steps)(step)))
  changes = {group: (rate(before, group), rate(run.num_steps, group)) for group in run.optim.rates}
  said = ", ".join(f"{group} {old:.3g} to {new:.3g}" for group, (old, new) in changes.items() if old != new)
  logging.info(
    "the run gets longer: %d steps instead of %d; %s",
    run.num_steps,
    before,
    f"its {run.optim.schedule_kind} schedule is that of the longer run from step {step} on: {said}"
    if said
    else "learning rates stay as they are",
  )


def overview(trainer: Trainer) -> str:
  """Return a table of the parameters: path, shape, dtype, number."""
  # Without statistics, which need values: there are only shapes yet.
  return parameter_overview.get_parameter_overview(trainer.shapes, include_stats=False) + "\n"


def log_end(run: Run, path: str) -> None:
  """Log which checkpoint of a finished run is best, where its picture and numbers are, and what to type next."""
  if run.checkpoint.best_metric and (best := checkpoint.best(path, run.checkpoint)):
    name = run.checkpoint.best_metric
    logging.info("best %s %.4f at step %d: evaluate --best measures it", name, best.value, best.step)
  folder = buckets.path(path)
  samples = folder / "samples"
  pictures = sorted(samples.glob("*_[0-9]*.png") if samples.is_dir() else (), key=lambda each: each.stem.split("_")[-1])
  picture = f"last samples in {pictures[-1]}, " if pictures else ""
  logging.info("finished at step %d: %smetrics in %s", run.num_steps, picture, folder / "metrics.jsonl")
  quoted = shlex.quote(path)
  command = f"diffdis %s --workdir={quoted}"
  if run.task.is_autoencoder:
    logging.info("to train DiffDis with this autoencoder: --config.init_from=%s", quoted)
  elif run.task.generates:
    prompt = shlex.quote(next(iter(run.sample_prompts), "a red star"))
    logging.info("to generate images: %s --prompt=%s --out=images", command % "generate", prompt)
  elif run.evals:
    logging.info("to measure it: %s --out=results.json", command % "evaluate")
  logging.info("to see all of it: %s --out=report.html", command % "report")


def log(trainer: Trainer) -> None:
  """Log mesh, data and parameters by group, so that a wrong regex shows before the first step."""
  if jax.process_count() == 1:  # each of several has logged its place when it joined the others
    processes.log_place()
  logging.info("mesh %s", dict(trainer.mesh.shape))
  for line in describe(trainer.run.data):
    logging.info("data: %s", line)
  for line in doubts(trainer.run):
    logging.warning("%s", line)
  logging.info(
    "objectives %s; parameters: %s",
    ", ".join(trainer.network.objectives),
    ", ".join(f"{group} {sum(parts.values()):,}" for group, parts in parameter_groups(trainer).items()),
  )
