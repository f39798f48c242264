"""The figures of docs/ are those that the records in replication/measured give, and a phone can read them."""

from __future__ import annotations

import functools
import itertools
import json
import re
from xml.etree import ElementTree

import pytest

from replication.figures import __main__ as figures
from replication.figures import measure_demo, plots, style

NAMES = [f"{name}.svg" for name in figures.FIGURES]
SVG = "{http://www.w3.org/2000/svg}"


@functools.cache
def drawn() -> dict[str, str]:
  return dict(figures.drawn())


def test_no_figure_is_left_from_an_earlier_script():
  assert sorted(path.name for path in figures.FOLDER.glob("*.svg")) == sorted(NAMES)


def test_there_are_at_least_eight_plots_of_records():
  assert len(plots.PLOTS) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_can_read_it(name):
  check_a_phone_can_read(drawn()[name])


def check_a_phone_can_read(svg: str) -> None:
  """At 390 px a unit is half a pixel. Letters take 0.55 of their size in width, on average."""
  root = ElementTree.fromstring(svg)
  texts = [*root.iter(f"{SVG}text")]
  assert texts and root.get("viewBox", "").split()[2] == str(style.WIDTH)
  height = float(root.get("viewBox", "").split()[3])
  for text in texts:
    words, size, x, y = "".join(text.itertext()), *(float(text.get(key, 0)) for key in ("font-size", "x", "y"))
    width = 0.55 * size * len(words.replace("\u200b", ""))
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor", "")]
    assert size >= style.SMALL and left >= -3 and left + width <= style.WIDTH + 3 and 0 < y < height, words


@pytest.mark.parametrize("name", NAMES)
def test_it_says_in_words_what_it_shows_and_fetches_nothing(name):
  root = ElementTree.fromstring(drawn()[name])
  assert root.get("role") == "img" and len(root.get("aria-label", "")) > 40
  assert root.findtext(f"{SVG}title") == root.get("aria-label")
  assert not re.search(r"(?:href|url)[=(]\"?(?:https?:|//)", drawn()[name])


def test_a_mean_in_a_figure_is_that_of_its_records():
  """Accuracy on `val_vendor` after 1,800 steps of generation, three seeds, read without the figures' code."""
  runs = json.loads((plots.records.HERE / "emoji.json").read_text())["runs"]
  found = [runs[f"generation_first_discrimination_1800-seed_{seed}"]["metrics"] for seed in range(3)]
  mean = sum(100 * each["zero_shot"]["val_vendor"][1]["acc1"] for each in found) / 3
  y = 400 + (90 - 400) * (mean - 20) / 50
  assert re.search(rf"<polyline points=\"[^\"]* [\d.]+,{style.number(y)} ", drawn()["emoji_generation_first.svg"])


@pytest.mark.parametrize(("value", "written"), [(12, "12"), (12.04, "12"), (12.06, "12.1"), (-0.01, "0"), (100, "100")])
def test_coordinates_are_tenths(value, written):
  assert style.number(value) == written


def test_a_scale_of_decades_is_even():
  scale = style.Scale(0.01, 100, 0, 400, log=True)
  assert [round(scale(value)) for value in (0.01, 0.1, 1, 10, 100)] == [0, 100, 200, 300, 400]


@pytest.mark.parametrize(
  ("words", "parts"),
  [
    ("z_t at t_z", ["z", "_t", " at t", "_z"]),
    ("L_ITA", ["L", "_ITA"]),
    ("no long_name, ε̂_0", ["no long_name, ε̂", "_0"]),
  ],
)
def test_subscripts_follow_single_letters(words, parts):
  assert style._split(words) == parts


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_counted_over_all_choices(n):
  choices = [*itertools.combinations(range(5), n)]
  counted = [sum(min(choice) == rank for choice in choices) / len(choices) for rank in range(5)]
  assert measure_demo.first_of(n, 5) == pytest.approx(counted)
