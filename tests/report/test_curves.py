from __future__ import annotations

import fractions
import json
import math

import numpy as np
import pytest

from diffdis_jax.report import curves


def lines_of(*objects):
  return [json.dumps(line) for line in objects]


def test_each_metric_has_the_steps_at_which_it_was_written():
  lines = lines_of({"step": 2, "loss": 1.5, "lr": None}, {"step": 4, "loss": 0.5, "lr": 3.0}, {"step": 4, "a/b": 7})
  metrics = curves.read([*lines, '{"step": 6, "lo'])
  assert metrics.keys() == {"loss", "lr", "a/b"}
  np.testing.assert_array_equal(metrics["loss"].steps, [2, 4])
  np.testing.assert_array_equal(metrics["loss"].values, [1.5, 0.5])
  np.testing.assert_array_equal(metrics["lr"].values, [math.nan, 3.0])
  assert (metrics["a/b"].steps.tolist(), metrics["a/b"].values.tolist()) == ([4], [7.0])


@pytest.mark.parametrize("value", ['"<img src=x>"', "[1]", "1" + "0" * 400], ids=["text", "list", "huge"])
def test_a_value_that_is_no_number_is_left_out(value):
  metrics = curves.read(['{"step": 1, "loss": 2.0, "lr": 1}', f'{{"step": 2, "loss": {value}, "lr": 2}}'])
  assert metrics["loss"].steps.tolist() == [1] and metrics["lr"].values.tolist() == [1.0, 2.0]


def test_lines_that_cannot_be_read_are_counted_but_for_the_last(caplog):
  lines = lines_of({"step": 1, "loss": 2.0})
  curves.read([*lines, '{"step": 2, "lo'])
  assert not caplog.text
  curves.read(["{", '{"step":' * 20_000, *lines, "{"])
  assert "metrics.jsonl has 2 lines that cannot be read" in caplog.text


def test_a_bucket_has_mean_least_and_most_of_its_finite_values():
  rng = np.random.default_rng(0)
  steps = np.sort(rng.choice(10_000, 3000, replace=False)) + 17
  values = rng.normal(size=3000)
  values[1234] = 1e6  # a spike of a single step
  values[[5, 700, 2999]] = math.nan
  values[900:1000] = math.nan  # more steps than a bucket holds
  band = curves.thin(curves.Curve(steps, values), 100)
  width = fractions.Fraction(int(steps[-1] - steps[0] + 1), 100)
  places = np.array([(int(step) - int(steps[0])) // width for step in steps])
  of_bucket = [values[places == k] for k in range(100)]
  finite = [bucket[np.isfinite(bucket)] for bucket in of_bucket]
  assert len(band.steps) == 100 and band.steps[-1] == steps[-1]
  assert [len(bucket) == 0 for bucket in finite] == np.isnan(band.mean).tolist() and np.isnan(band.mean).any()
  for values, f in ((band.mean, np.mean), (band.least, np.min), (band.most, np.max)):
    np.testing.assert_allclose(values, [f(bucket) if len(bucket) else math.nan for bucket in finite], rtol=1e-12)
  assert np.nanmax(band.most) == 1e6


def test_charts_keep_losses_quarters_evaluations_and_rates_together():
  names = ["loss", "loss_generation", *(f"loss_generation_q{i}" for i in (1, 2, 3, 4)), "grad_norm", "temperature"]
  names += ["steps_per_sec", "coco/recall", "flickr/recall", "coco/acc", "substituted"]
  charts = curves.group(names)
  assert sorted(metric for chart in charts for metric, _ in chart["series"]) == sorted(names), "each in one chart"
  by_title = {chart["title"]: chart for chart in charts}
  quarters = by_title["Loss, generation, by quarter of the timestep"]
  assert [metric for metric, _ in quarters["series"]] == [f"loss_generation_q{i}" for i in (1, 2, 3, 4)]
  assert by_title["recall"]["series"] == [["coco/recall", "coco"], ["flickr/recall", "flickr"]]
  sections = {title: chart["section"] for title, chart in by_title.items()}
  assert sections["acc"] == "evaluations" and sections["Steps a second"] == "speed" and sections["Loss"] == "losses"
