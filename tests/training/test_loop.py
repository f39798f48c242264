from __future__ import annotations

import jax
import numpy as np

from diffdis_jax.parallel import processes
from diffdis_jax.training import loop


def test_the_host_that_waits_longest_for_data_is_named(monkeypatch):
  assert loop.slowest_host(0.5) == {}
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(processes, "gathered", lambda own: np.float32([own, np.nan, 0.75]))
  assert loop.slowest_host(0.25) == {"slowest_host": 2.0, "slowest_host_data_wait": 0.75}
