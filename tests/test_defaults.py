"""The choices that configs name are those of the networks, optimisers and losses."""

from __future__ import annotations

from typing import Any

import pytest

from diffdis_jax.config import model, sections
from diffdis_jax.config.objectives import TABLE
from diffdis_jax.models import attention, layers, remat
from diffdis_jax.training import optim, step


@pytest.mark.parametrize(
  "names, there",
  [
    (model.DTYPES, layers.DTYPES),
    (model.ACTIVATIONS, layers.ACTIVATIONS),
    (model.REMAT_POLICIES, remat.REMAT_POLICIES),
    (model.ATTENTION_KERNELS[1:], attention.KERNELS),
    (sections.MOMENTS, optim.MOMENTS),
  ],
)
def test_choices_are_those_that_there_are(names: tuple[str, ...], there: Any):
  assert names == (*there,)


def test_every_objective_has_a_loss():
  assert step.LOSSES.keys() == TABLE.keys()
