from __future__ import annotations

import pytest

from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.training import evaluator
from tests import steps, tiny


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"task": "fid", "parts": "x"}, "evaluation fid has no setting 'parts'"),
    ({"task": "zero_shot"}, "train_evals has some, whose task zero_shot measures discrimination or .*: leave it out"),
  ],
)
def test_what_cannot_be_measured_while_a_run_trains(section, message):
  """Before the first step, not at the first or second evaluation."""
  config = tiny.get_config()
  config.objectives = ("generation",)
  config.evals, config.train_evals = {"some": section}, ("some",)
  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=4)
  with pytest.raises(UserError, match=message):
    evaluator.Evaluator(Run.of(config), inference)
