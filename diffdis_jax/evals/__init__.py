"""Evaluations by name."""

from __future__ import annotations

import inspect
from typing import Any

from diffdis_jax.errors import UserError
from diffdis_jax.evals.agreement import Agreement
from diffdis_jax.evals.base import Eval
from diffdis_jax.evals.fid import Fid
from diffdis_jax.evals.retrieval import Retrieval
from diffdis_jax.evals.zero_shot import ZeroShot

EVALS = {"zero_shot": ZeroShot, "retrieval": Retrieval, "agreement": Agreement, "fid": Fid}


def create(task: str, **section: Any) -> Eval:
  """The evaluation of this name, with the rest of its config section as settings.

  Raises:
    UserError: no such evaluation, or settings or data that it refuses.
  """
  if task not in EVALS:
    raise UserError(f"unknown evaluation {task!r}; there are {', '.join(EVALS)}")
  signature = inspect.signature(EVALS[task])
  try:
    signature.bind(**section)
  except TypeError as error:
    raise UserError(f"evaluation {task}: {error}; it takes {', '.join(signature.parameters)}") from error
  return EVALS[task](**section)
