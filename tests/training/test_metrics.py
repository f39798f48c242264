"""Test the measured speed of a run and its progress line."""

from __future__ import annotations

import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from clu.metrics import Average

from diffdis_jax.config import Run
from diffdis_jax.training import metrics
from tests import tiny


class Clock:
  """A clock that replaces the module `time`."""

  now = 100.0

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  monkeypatch.setattr(metrics, "time", clock := Clock())
  return clock


def metrics_of_step(loss=1.5):
  one = jnp.ones(())
  return {"loss": Average(total=jnp.float32(loss), count=one), "skipped": Average(total=jnp.zeros(()), count=one)}


def test_speed_counts_steps_and_waiting_without_pauses(clock, monkeypatch):
  run = Run.of(tiny.get_config()).replace({"batch_size": 32, "num_steps": 110})
  meters = metrics.Meters(run, start_step=10, meta={})
  monkeypatch.setattr(metrics.loader.Substitutions, "take", lambda self, batch: batch)

  def batches():
    while True:
      clock.now += 0.2
      yield {}

  data = batches()
  clock.now += 1000.0  # the first step compiles
  meters.add(11, metrics_of_step())
  speeds = meters.report(11)
  assert all(math.isnan(speeds[name]) for name in ("steps_per_sec", "images_per_sec", "data_wait"))
  with meters.paused():
    clock.now += 1000.0
  for step in range(12, 22):
    meters.next_rows(data)
    clock.now += 0.3
    meters.add(step, metrics_of_step(step))
  speeds = meters.report(21)
  assert speeds == pytest.approx(
    {"loss": 16.5, "steps_per_sec": 2.0, "images_per_sec": 64.0, "data_wait": 0.4, "substituted": 0}
  )
  busy = types.SimpleNamespace(
    is_ready=lambda: False
  )  # while the devices are busy, a batch that arrives late delays nothing
  monkeypatch.setattr(meters, "_last", {"loss": busy})
  meters.next_rows(data)
  meters._last = None
  meters.add(22, metrics_of_step())
  assert meters.report(22)["data_wait"] == 0.0
  assert next(meters.steps()) == 11


def test_totals_survive_json_bit_for_bit():
  rng, run = np.random.default_rng(0), Run.of(tiny.get_config())
  pairs = rng.normal(size=(100, 2)).astype(np.float32)
  totals = {f"m{i}": Average(total=total, count=count) for i, (total, count) in enumerate(pairs)}
  meters = metrics.Meters(run, start_step=0, meta={})
  meters.add(1, totals)
  meta = json.loads(json.dumps(meters.to_meta()))
  assert metrics.Meters(run, start_step=1, meta=meta).to_meta() == meta
  assert meta["totals"] == {name: [float(x.total), float(x.count)] for name, x in totals.items()}


JOINT = ("loss_discrimination", "loss_generation")  # in jax's order


@pytest.mark.parametrize(
  "names, seconds, expected",
  [
    (
      JOINT,
      81.3,
      "step 1000000/2000000  loss 9.8765  L_IG 9.88  L_ITA 9.88  81.3 s/step  data wait 20%  22583h20m left",
    ),
    (("loss_contrastive",), 1.0, "step 1000000/2000000  loss 9.8765  1 steps/s  data wait 20%  277h46m left"),
    (JOINT, math.nan, "step 1000000/2000000  loss 9.8765  L_IG 9.88  L_ITA 9.88"),
  ],
)
def test_the_progress_line_fits_a_terminal(names, seconds, expected):
  values = {"loss": 9.87654} | dict.fromkeys(names, 9.87654) | {"grad_norm": 1.0}
  values |= {"steps_per_sec": 1 / seconds, "data_wait": 0.2}
  line = metrics.progress_line(1_000_000, 2_000_000, values)
  assert line == expected and len(line) <= 100
