"""Plain programs, whose least time follows from a chip's peak figures."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.preflight import chips, targets
from tests.preflight import calibration


@pytest.mark.parametrize(
  "name, operations, moved",
  [
    ("product 8192 x 8192 x 8192", 2 * 8192**3, 3 * 8192**2 * 2),
    ("product 16384 x 320 x 2560", 2 * 16384 * 320 * 2560, (16384 * 320 + 320 * 2560 + 16384 * 2560) * 2),
    ("convolution 3 x 3, 8 x 8, 1280 channels", 2 * 16 * 64 * 9 * 1280**2, (2 * 16 * 64 * 1280 + 9 * 1280**2) * 2),
    ("gradient of the last one's kernel", 2 * 16 * 64 * 9 * 1280**2, (2 * 16 * 64 * 1280 + 9 * 1280**2) * 2),
    ("sum of 64 Mi numbers, f32", 0, 3 * 2**26 * 4),
    ("sum of 64 Mi numbers, bf16", 0, 3 * 2**26 * 2),
  ],
)
def test_what_a_program_computes_and_moves(name, operations, moved):
  assert calibration.PROGRAMS[name].lower(jax.devices()[0])[1:] == (operations, moved)


def test_a_line_gives_each_estimate_over_the_least_time():
  result = {"seconds_least": 2e-3, "seconds": 3e-3, "seconds_by_cycles": None}
  said = calibration.line("product", result)
  assert said == "product: at least 2.000 ms; its sum 1.50, by cycles none times that"


def test_a_compiler_without_estimates_is_refused():
  target = targets.Target(devices=jax.devices()[:1], chip=chips.CHIPS["h100"], compiler="cuda", exact=True)
  with pytest.raises(UserError, match="estimates no time"):
    calibration.calibrate(target)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_large_plain_programs_are_estimated_at_up_to_half_more_than_the_least(topology, monkeypatch):
  large = ("product 8192 x 8192 x 8192", "sum of 64 Mi numbers, f32")
  monkeypatch.setattr(calibration, "PROGRAMS", {name: calibration.PROGRAMS[name] for name in large})
  for result in calibration.calibrate(targets.find("tpu", chips.parse(topology), 1)).values():
    assert 0.99 < result["seconds"] / result["seconds_least"] < 1.5
