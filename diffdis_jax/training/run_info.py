"""Log and record a run at its start and at its end."""

from __future__ import annotations

import math
import shlex
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from diffdis_jax.common import machine
from diffdis_jax.config.run import Run
from diffdis_jax.data.build import describe, doubts
from diffdis_jax.parallel import processes
from diffdis_jax.run import checkpoint, digests, provenance, workdir
from diffdis_jax.training.step import Trainer


def parameter_groups(trainer: Trainer) -> dict[str, dict[str, int]]:
  """Count the parameters by the optimizer's group and the part of the network."""
  sizes: dict[str, Counter[str]] = {}
  for path, group in trainer.groups.items():
    sizes.setdefault(group, Counter())[path.split(".")[0]] += math.prod(trainer.shapes[path].shape)
  return {group: dict(parts) for group, parts in sizes.items()}


def of_start(trainer: Trainer, *, begins: bool) -> dict[str, Any]:
  """Return the facts for a start in history.jsonl, with the origin of the parameters if the run `begins`."""
  return {
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "device_kind": jax.devices()[0].device_kind,
    "processors": machine.processors(),
    "host": socket.gethostname(),
    "jax": jax.__version__,
    **provenance.code(),
    # A resumed run takes its parameters from its own checkpoint.
    **({"init_from": provenance.behind(trainer.run.init_from)} if begins else {}),
    "mesh": dict(trainer.mesh.shape),
    "num_steps": trainer.run.num_steps,  # a later start may increase it
    "parameters": parameter_groups(trainer),
    "data": describe(trainer.run.data),
    "data_digests": digests_of(trainer.run),
  }


def digests_of(run: Run) -> dict[str, str]:
  """Return the digests of the records of prepared data, by the field of the data's path, such as `data.path`."""
  paths = {
    "data.path" if name == "data" else f"data.mixture.{name}.path": section.get("path")
    for name, section in run.data.sources.items()
  }
  return _digests(paths)


def _digests(paths: Mapping[str, Any]) -> dict[str, str]:
  """Return the digests of the paths with prepared data."""
  by_field = {field: digests.fingerprint(str(path), part=digests.RECORDS) for field, path in paths.items() if path}
  return {field: digest for field, digest in by_field.items() if digest}


def moved(run: Run, path: str) -> set[str]:
  """Return the path fields that now name a copy of the data of the last start of the run in this workdir."""
  before = _last(path, "data_digests") or {}
  return {field for field, digest in digests_of(run).items() if before.get(field) == digest}


def _last(path: str, name: str) -> Any:
  """Return this value from the newest event of the run that has it, or None."""
  return next((event[name] for event in reversed(provenance.read(path)) if name in event), None)


def check_same_on_all(run: Run) -> None:
  """Raise UserError on every process if a host has other data, another config or other code than host 0.

  Such hosts would read rows in different orders, start from different parameters, or wait for a program that the others
  do not run.
  """
  if jax.process_count() == 1:
    return
  measured = {f"evals.{name}.data.path": (run.evals[name].get("data") or {}).get("path") for name in run.train_evals}
  data = {f"records of {field}": digest for field, digest in (digests_of(run) | _digests(measured)).items()}
  data["data"] = "; ".join(describe(run.data))
  values = {**workdir.flatten(run.to_dict()), **provenance.code(), **data}
  processes.check_same(values, "start the same command, with the same code, packages and data, on every host")


def log_changes(run: Run, path: str, *, before: int | None, step: int) -> None:
  """Log the differences from the last start of a run that resumes at this step.

  Args:
    before: the run's number of steps before it was made longer, or None.
  """
  if before is not None:
    schedule = run.optim.schedule_kind
    logging.info("the run gets longer: %d steps instead of %d, by its %s schedule", run.num_steps, before, schedule)
  if not step or not processes.is_first():
    return
  # Compare the records' digests if there are some, which do not depend on paths.
  now = digests_of(run) or describe(run.data)
  then = _last(path, "data_digests") or _last(path, "data")
  if then is not None and now != then:
    message = "the data have changed since the last start: %s then, %s now; the order of records is another one"
    logging.warning(message, then, now)


def log_end(run: Run, path: str) -> None:
  """Log where the results of a finished run are, and the commands to type next."""
  if run.checkpoint.best_metric and (best := checkpoint.best(path, run.checkpoint)):
    name = run.checkpoint.best_metric
    logging.info("best %s %.4f at step %d: evaluate --best measures it", name, best.value, best.step)
  logging.info("finished at step %d: metrics and samples in %s", run.num_steps, path)
  workdir_flag = f"--workdir={shlex.quote(path)}"
  if run.task.network == "autoencoder":
    logging.info("to train DiffDis with this autoencoder: --config.init_from=%s", shlex.quote(path))
  elif run.task.generates:
    prompt = shlex.quote(next(iter(run.sample_prompts), "a red star"))
    logging.info("to generate images: diffdis generate %s --prompt=%s --out=images", workdir_flag, prompt)
  elif run.evals:
    logging.info("to measure it: diffdis evaluate %s --out=results.json", workdir_flag)
  logging.info("to see all of it: diffdis report %s --out=report.html", workdir_flag)


def log(trainer: Trainer) -> None:
  """Log the mesh, the data and the parameters by group, so that a wrong regex is seen before the first step."""
  if jax.process_count() == 1:  # several processes log their place when they join
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
