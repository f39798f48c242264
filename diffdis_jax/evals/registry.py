"""Evaluations by name."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from diffdis_jax.common.guesses import did_you_mean
from diffdis_jax.config.objectives import ALIGNED, COMPARING, GENERATIVE
from diffdis_jax.config.section import check_number
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import settings
from diffdis_jax.evals.base import Eval
from diffdis_jax.evals.diffusion_classifier import DiffusionClassifier
from diffdis_jax.evals.fid import Fid
from diffdis_jax.evals.generation_accuracy import GenerationAccuracy
from diffdis_jax.evals.held_out_loss import HeldOutLoss
from diffdis_jax.evals.linear_probe import LinearProbe
from diffdis_jax.evals.long_tail import LongTail
from diffdis_jax.evals.retrieval import Retrieval
from diffdis_jax.evals.settings import Setting
from diffdis_jax.evals.zero_shot import ZeroShot

EVALS = {
  "zero_shot": ZeroShot,
  "retrieval": Retrieval,
  "generation_accuracy": GenerationAccuracy,
  "fid": Fid,
  "held_out_loss": HeldOutLoss,
  "long_tail": LongTail,
  "diffusion_classifier": DiffusionClassifier,
  "linear_probe": LinearProbe,
}
FORMER = {"agreement": "generation_accuracy", "recognition": "generation_accuracy"}  # names of tasks -> today's
# What a run has to be trained for, one of them; a task that is not here needs none.
MEASURES = {
  "zero_shot": ALIGNED,
  "retrieval": ALIGNED,
  "diffusion_classifier": GENERATIVE,
  "generation_accuracy": GENERATIVE,
  "fid": GENERATIVE,
  "held_out_loss": tuple(dict.fromkeys(GENERATIVE + COMPARING)),
  "long_tail": ALIGNED,
  "linear_probe": tuple(dict.fromkeys(GENERATIVE + ALIGNED)),  # of which an autoencoder alone has no features
}
GENERATING = ("generation_accuracy", "fid")  # images
WITHOUT_QUERIES = ("held_out_loss",)  # whose figures are the same however text queries are denoised
# Tasks that no config names; they are measured on the sets of another one.
ON_THE_SETS_OF = {"diffusion_classifier": "zero_shot"}
MOST_SEED = 2**32 - 1  # of jax's random keys


@functools.cache
def settings_of(task: str) -> dict[str, Setting]:
  """Return the settings of an evaluation that a flag can give. Raises UserError: no such evaluation."""
  check_task(task)
  return settings.of(EVALS[task])


def check_task(task: str) -> None:
  """Check the name of an evaluation. Raises UserError: there is no evaluation of this name, or it has another name
  today."""
  if task in FORMER:
    raise UserError(f"task {task} is now called {FORMER[task]}; write that instead")
  if task not in EVALS:
    raise UserError(f"unknown task {task!r}; {did_you_mean(task, EVALS)}")


def check_objectives(what: str, task: str, objectives: Collection[str]) -> None:
  """Refuse an evaluation, named by `what`, of what these objectives do not train. Raises UserError for it."""
  if task in MEASURES and not {*MEASURES[task]} & {*objectives}:
    raise UserError(
      f"{what}, whose task {task} measures {' or '.join(MEASURES[task])}; the run's objectives are"
      f" {', '.join(objectives)}: leave it out"
    )


def create(task: str, **section: Any) -> Eval:
  """Create the evaluation of this name, with the rest of its config section as settings.

  Raises:
    UserError: no such evaluation, or settings or data that it refuses.
  """
  check(task, **section)
  return EVALS[task](**section)


def check(task: str, **section: Any) -> None:
  """Check the name and the settings of an evaluation; no data are opened. Raises UserError: no such evaluation, or
  settings that it does not have or that are of another type."""
  check_task(task)
  # Types first, then the data's fields, then the range of the seed: the constructor opens the data, which takes longer.
  settings.check(f"evaluation {task}", EVALS[task], section)
  if section.get("data") is not None:
    settings.check(f"data of evaluation {task}", sources.open_source, section["data"])
  check_number(f"evaluation {task}: seed", section.get("seed", 0), ge=0, le=MOST_SEED)
