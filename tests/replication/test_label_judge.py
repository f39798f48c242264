"""Test the judge of labelled images with a generator of coloured discs."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import tasks as evals
from replication import label_judge

pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "grey": (120, 120, 120)}


def paint(name: str, seed: int) -> np.ndarray:
  """Paint a disc in the class's colour."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:16, :16]
  disc = (x - rng.uniform(6, 10)) ** 2 + (y - rng.uniform(6, 10)) ** 2 < rng.uniform(16, 36)
  return np.where(disc[..., None], COLOURS[name], 255).astype(np.uint8)


def records(*names: str, each: int) -> list[dict]:
  return [{"image": paint(name, seed), "label": name} for seed in range(each) for name in names]


class Painter:
  """This generator paints the colour that the prompt names, or the one that `instead` has for it."""

  image_size = 16
  max_length = 8
  aligned = False
  generation_protocol = {"steps": 30, "guidance": 2.0}

  def __init__(self, **instead):
    self.instead, self.asked = instead, []

  def noise(self, n, seed):
    return np.full((n, 2, 2, 4), seed, np.float32)

  def generate(self, params, tokens, noise):
    assert len(tokens) == len(noise)
    texts = [*map(Tokenizer(self.max_length).decode, tokens)]
    self.asked = [next(name for name in COLOURS if name in text) for text in texts]
    return np.stack([paint(self.instead.get(name, name), 1000 + i) for i, name in enumerate(self.asked)])


@pytest.fixture(scope="module", autouse=True)
def compiled_well() -> Iterator[None]:
  """Let the compiler optimise: the judge's training takes longer than its compiling."""
  quick = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="module")
def evaluation(request):
  """Return the task on the three colours of `train`. The judge also learns a fourth one from `other`."""
  patch = pytest.MonkeyPatch()
  patch.setattr(sources, "open_source", lambda **section: SPLITS[section["split"]])
  request.addfinalizer(patch.undo)
  return evals.create(
    "generation_accuracy", data={"split": "train"}, splits=("other",), template="a {}", epochs=8, per_class=5
  )


SPLITS = {"train": records("red", "green", "blue", each=64), "other": records("red", "grey", each=32)}


def test_a_generator_of_what_was_asked_for_is_accurate(evaluation):
  painter = Painter()
  metrics = evaluation.run(painter, {})
  assert metrics["judge_acc1"] >= 0.95 and metrics["acc1"] >= 0.95
  assert metrics["judge_acc5"] == metrics["acc5"] == 1.0  # of four classes
  assert sorted(painter.asked) == ["blue"] * 5 + ["green"] * 5 + ["red"] * 5


def test_a_generator_of_something_else_is_not_accurate(evaluation):
  assert evaluation.run(Painter(red="green", green="blue", blue="grey"), {})["acc1"] <= 0.1
  one_wrong = evaluation.run(Painter(red="grey"), {})
  assert one_wrong["acc1"] == pytest.approx(2 / 3, abs=0.1)
  assert one_wrong["judge_acc1"] == evaluation.named_by.train().accuracy["judge_acc1"]  # trained once


def test_ties_and_nans_are_wrong():
  logits = np.array([[3.0, 1.0, 2.0], [3.0, 3.0, 1.0], [np.nan, 1.0, 2.0], [0.0, 1.0, 2.0]], np.float32)
  np.testing.assert_array_equal(label_judge.ranks(logits, np.array([0, 0, 0, 0])), [0, 1, 2, 2])
  np.testing.assert_array_equal(label_judge.ranks(logits[2:], np.array([2, 1])), [1, 1])
