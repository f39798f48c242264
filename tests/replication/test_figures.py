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

pytestmark = pytest.mark.slow

SVG = "{http://www.w3.org/2000/svg}"


@functools.cache
def drawn(name: str) -> str:
  return figures.FIGURES[name]().svg()


def test_no_figure_is_left_from_an_earlier_script():
  assert sorted(path.stem for path in figures.FOLDER.glob("*.svg")) == sorted(figures.FIGURES)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_phone_can_read_it(name):
  check_a_phone_can_read(drawn(name))


def check_a_phone_can_read(svg: str) -> None:
  """At 390 px a unit is two thirds of a pixel. Letters take 0.55 of their size in width, on average."""
  root = ElementTree.fromstring(svg)
  width, height = (float(value) for value in root.get("viewBox", "").split()[2:])
  texts = [text for text in root.iter(f"{SVG}text") if text.get("x")]
  assert texts and width == 72 * style.WIDTH
  for text in texts:
    how, words = text.get("style", ""), "".join(text.itertext())
    size, x, y = float(re.search(r"font-size: (\d+)", how)[1]), float(text.get("x", 0)), float(text.get("y", 0))
    length = 0.55 * size * len(words)
    left = x - length * {"middle": 0.5, "end": 1}.get((re.findall(r"text-anchor: (\w+)", how) or ["start"])[0], 0)
    if "rotate" in text.get("transform", ""):  # an axis' title, upright
      left, length = x, 0
    assert size >= 16 and left >= -8 and left + length <= width + 8 and 0 < y < height, words


@pytest.mark.parametrize("name", figures.FIGURES)
def test_it_says_in_words_what_it_shows_and_fetches_nothing(name):
  root = ElementTree.fromstring(drawn(name))
  assert root.get("role") == "img" and len(root.findtext(f"{SVG}title")) > 40
  assert not re.search(r"(?:href|url)[=(]\"?(?:https?:|//)", drawn(name))


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
