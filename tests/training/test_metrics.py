"""How fast a run is, and its progress line."""

from __future__ import annotations

import math

import jax.numpy as jnp
import pytest
from absl import logging

from diffdis_jax.training import metrics


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_progress_counts_steps_waiting_and_pauses(caplog):
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  clock = Clock()
  progress = metrics.Throughput(start_step=10, num_steps=110, batch_size=32, clock=clock)
  with progress.paused():
    clock.now += 1000.0
  for _ in range(10):
    with progress.waiting_for_data(lambda: False):
      clock.now += 0.2
    clock.now += 0.3
    with progress.waiting_for_data(lambda: True):  # the devices did not wait
      clock.now += 0.2
    clock.now += 0.3
  speeds = progress.report(30, {"loss": jnp.float32(1.5), "loss_l1": 0.25, "loss_kl": 1e-5, "lr": 3.0})
  assert speeds == pytest.approx({"steps_per_sec": 2.0, "images_per_sec": 64.0, "data_wait": 0.2})
  assert caplog.messages == ["step 30/110  loss 1.5000  l1 0.25  kl 1e-05  2 steps/s  data wait 20%  0m40s left"]

  clock.now += 10.0
  with progress.waiting_for_data(lambda: False):
    clock.now += 100.0
  progress.restart(31)
  speeds = progress.report(31, {"loss": 1.0})
  assert all(math.isnan(value) for value in speeds.values()) and caplog.messages[1:] == ["step 31/110  loss 1.0000"]

  clock.now += 10.0
  speeds = progress.report(32, {"loss": 1.0})
  assert speeds == pytest.approx({"steps_per_sec": 0.1, "images_per_sec": 3.2, "data_wait": 0.0})


def test_progress_knows_the_share_of_the_chips_peak(caplog):
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  clock = Clock()
  progress = metrics.Throughput(start_step=0, num_steps=40, batch_size=2, peak_rate=8.0, clock=clock)
  steps = progress.steps()
  for _ in range(10):
    next(steps)
    clock.now += 0.5
  assert progress.report(10, {"loss": 1.0})["hfu"] == pytest.approx(0.25)  # two steps a second of eight
  assert caplog.messages == ["step 10/40  loss 1.0000  2 steps/s  data wait 0%  0m15s left"]
  progress.restart(11)
  assert math.isnan(progress.report(11, {"loss": 1.0})["hfu"])


JOINT = ("loss_discrimination", "loss_generation")  # as jax sorts them


@pytest.mark.parametrize(
  "names, seconds, expected",
  [
    (
      (*JOINT, *(f"{name}_q{quarter}" for name in JOINT for quarter in range(1, 5))),
      81.3,
      "step 1000000/2000000  loss 9.8765  L_IG 9.88  L_ITA 9.88  81.3 s/step  data wait 20%  940d23h left",
    ),
    (JOINT, 0.5, "step 1000000/2000000  loss 9.8765  L_IG 9.88  L_ITA 9.88  2 steps/s  data wait 20%  5d18h left"),
    (("loss_contrastive",), 1.0, "step 1000000/2000000  loss 9.8765  1 steps/s  data wait 20%  11d13h left"),
    (
      ("loss_class_contrastive", "loss_distill"),
      0.01,
      "step 1000000/2000000  loss 9.8765  class 9.88  distill 9.88  100 steps/s  data wait 20%  2h46m left",
    ),
  ],
)
def test_the_progress_line_fits_a_terminal(caplog, names, seconds, expected):
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  clock = Clock()
  progress = metrics.Throughput(
    start_step=1_000_000 - 10, num_steps=2_000_000, batch_size=4096, peak_rate=8.0, clock=clock
  )
  for _ in range(10):
    with progress.waiting_for_data(lambda: False):
      clock.now += 0.2 * seconds
    clock.now += 0.8 * seconds
  means = {"loss": 9.87654} | dict.fromkeys(names, 9.87654) | {"grad_norm": 1.0, "learning_rate": 1e-4}
  speeds = progress.report(1_000_000, means)
  assert caplog.messages == [expected] and len(expected) <= 100
  assert speeds.keys() == {"steps_per_sec", "images_per_sec", "data_wait", "hfu"}


def test_progress_gives_the_steps_that_are_left():
  assert list(metrics.Throughput(start_step=3, num_steps=6, batch_size=1).steps()) == [4, 5, 6]
  assert list(metrics.Throughput(start_step=6, num_steps=6, batch_size=1).steps()) == []
