"""Evaluations by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from diffdis_jax.config.objectives import ALIGNED, GENERATIVE
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError, check_type
from diffdis_jax.evals.agreement import Agreement
from diffdis_jax.evals.base import Eval
from diffdis_jax.evals.fid import Fid
from diffdis_jax.evals.long_tail import LongTail
from diffdis_jax.evals.recognition import Recognition
from diffdis_jax.evals.retrieval import Retrieval
from diffdis_jax.evals.zero_shot import ZeroShot

EVALS = {
  "zero_shot": ZeroShot,
  "retrieval": Retrieval,
  "agreement": Agreement,
  "recognition": Recognition,
  "fid": Fid,
  "long_tail": LongTail,
}
_LIKE = {"int": 0, "float": 0.0, "bool": False}  # annotation of a setting -> a value of its type
# What a run has to be trained for, one of them.
MEASURES = {
  "zero_shot": ALIGNED,
  "retrieval": ALIGNED,
  "agreement": GENERATIVE,
  "recognition": GENERATIVE,
  "fid": GENERATIVE,
  "long_tail": ALIGNED,
}


def check_objectives(name: str, task: str, objectives: Collection[str]) -> None:
  """Raises UserError for an evaluation, by its name in the config, of what these objectives do not train."""
  if task in MEASURES and not {*MEASURES[task]} & {*objectives}:
    raise UserError(
      f"train_evals has {name}, whose task {task} measures {' or '.join(MEASURES[task])}; the run's objectives are"
      f" {', '.join(objectives)}: leave it out"
    )


def create(task: str, **section: Any) -> Eval:
  """The evaluation of this name, with the rest of its config section as settings.

  Raises:
    UserError: no such evaluation, or settings or data that it refuses.
  """
  if task not in EVALS:
    raise UserError(f"unknown evaluation {task!r}; there are {', '.join(EVALS)}")
  _check_takes(f"evaluation {task}", EVALS[task], section)
  if "data" in section:
    _check_takes(f"data of evaluation {task}", sources.open_source, section["data"])
  return EVALS[task](**section)


def _check_takes(what: str, made: Callable[..., Any], settings: Any) -> None:
  """Raises UserError unless `made` can be called with these settings."""
  taken = inspect.signature(made)
  if not isinstance(settings, Mapping):
    raise UserError(f"{what} is {settings!r}; it should have {', '.join(taken.parameters)}")
  try:
    taken.bind(**settings)
  except TypeError as error:
    raise UserError(f"{what}: {error}; it takes {', '.join(taken.parameters)}") from error
  for name, value in settings.items():
    kinds = str(taken.parameters[name].annotation).split(" | ") if name in taken.parameters else ["Any"]
    if kinds == ["Any"] or (value is None and "None" in kinds):
      continue
    if kinds[0] in _LIKE:
      check_type(f"{what}: {name}", value, _LIKE[kinds[0]])
    elif not isinstance(value, str | Sequence | Mapping | os.PathLike):
      raise UserError(f"{what}: {name} is {value!r}; it must be {' or '.join(kinds)}")
