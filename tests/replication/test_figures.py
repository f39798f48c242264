"""Test that the figures of docs/ show the values of the records in replication/measured."""

from __future__ import annotations

import itertools
import json

import pytest

from replication.figures import __main__ as figures
from replication.figures import measure_demo, plots

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_drawn_from_its_records(name):
  assert "</svg>" in figures.FIGURES[name]().svg()


def test_a_mean_in_a_figure_is_that_of_its_records():
  """Compute accuracy on `val_vendor` after 1,800 steps of generation, over three seeds, without the figures' code."""
  runs = json.loads((plots.records.HERE / "emoji.json").read_text())["runs"]
  metrics = [runs[f"generation_first_discrimination_1800-seed_{seed}"]["metrics"] for seed in range(3)]
  mean = sum(100 * of_seed["zero_shot"]["val_vendor"][1]["acc1"] for of_seed in metrics) / 3
  lines = plots.emoji_generation_first().figure.axes[0].lines
  (line,) = [line for line in lines if line.get_label() == "1,800"]
  assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True))[1800] == pytest.approx(mean)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_counted_over_all_choices(n):
  choices = [*itertools.combinations(range(5), n)]
  counted = [sum(min(choice) == rank for choice in choices) / len(choices) for rank in range(5)]
  assert measure_demo.first_of(n, 5) == pytest.approx(counted)
