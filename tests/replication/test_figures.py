"""The figures of docs/ show what the records in replication/measured hold."""

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


def test_no_figure_is_left_from_an_earlier_script():
  assert sorted(path.stem for path in figures.FOLDER.glob("*.svg")) == sorted(figures.FIGURES)


def test_a_mean_in_a_figure_is_that_of_its_records():
  """Accuracy on `val_vendor` after 1,800 steps of generation, three seeds, read without the figures' code."""
  runs = json.loads((plots.records.HERE / "emoji.json").read_text())["runs"]
  found = [runs[f"generation_first_discrimination_1800-seed_{seed}"]["metrics"] for seed in range(3)]
  mean = sum(100 * each["zero_shot"]["val_vendor"][1]["acc1"] for each in found) / 3
  lines = plots.emoji_generation_first().figure.axes[0].lines
  (line,) = [line for line in lines if line.get_label() == "1,800"]
  assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True))[1800] == pytest.approx(mean)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_counted_over_all_choices(n):
  choices = [*itertools.combinations(range(5), n)]
  counted = [sum(min(choice) == rank for choice in choices) / len(choices) for rank in range(5)]
  assert measure_demo.first_of(n, 5) == pytest.approx(counted)
