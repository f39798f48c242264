from __future__ import annotations

import jax
import numpy as np
import pytest

from diffdis_jax.config import Run
from diffdis_jax.parallel import processes
from diffdis_jax.training import loop
from diffdis_jax.training.steps import slowest_host
from tests import steps


def test_the_host_that_waits_longest_for_data_is_named(monkeypatch):
  assert slowest_host(0.5) == {}
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(processes, "gathered", lambda own: np.array([own, np.nan, 0.75], np.float32))
  assert slowest_host(0.25) == {"slowest_host": 2.0, "slowest_host_data_wait": 0.75}


@pytest.mark.parametrize(
  "batch_size, accumulate, of_a_call, rows",
  [(48, 1, 64, 64), (48, 4, 64, 12), (1024, 1, 512, 512), (256, 1, 512, 256), (1024, 4, 512, 256)],
)
def test_evaluations_take_no_more_rows_than_a_step(monkeypatch, batch_size, accumulate, of_a_call, rows):
  run = Run.of(steps.make_config(batch_size=batch_size, **{"optim.accumulate": accumulate}))
  monkeypatch.setattr(loop.batches, "rows_of_a_call", lambda mesh: of_a_call)
  assert loop.rows_at_a_time(run, steps.make_mesh()) == rows
