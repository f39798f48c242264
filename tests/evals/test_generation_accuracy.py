"""Test the classifier that judges generated shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from diffdis_jax.data import shapes
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import generation_accuracy
from diffdis_jax.evals import tasks as evals


@pytest.fixture(scope="module", autouse=True)
def compiled_well() -> Iterator[None]:
  """Turn the compiler's optimisation on: the judge's training takes longer than its compilation."""
  disabled = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", disabled)


class Renderer:
  """A generator that renders the colour and the shape of the prompt, or those that `instead` returns."""

  image_size = 32
  max_length = 16
  aligned = False
  generation_protocol = {"steps": 30, "guidance": 2.0}

  def __init__(self, instead=lambda colour, shape: (colour, shape)):
    self.instead = instead

  def noise(self, n, seed):
    return np.full((n, 4, 4, 4), seed, np.float32)

  def generate(self, params, tokens, noise):
    assert len(tokens) == len(noise)
    decode = Tokenizer(self.max_length).decode
    return np.stack([self.draw(decode(row), np.random.default_rng([99, i])) for i, row in enumerate(tokens)])

  def draw(self, text, rng):
    pair = next((c, s) for c, s in shapes.PAIRS if c in text and s in text)
    colour, shape = self.instead(*pair)
    return shapes.render(shapes.make_scene(rng, colour=colour, shape=shape), image_size=32, rng=rng)


@pytest.fixture(scope="module")
def evaluation():
  return evals.create("generation_accuracy", per_class=2)


@pytest.mark.slow
def test_correct_renders_are_judged_accurate(evaluation):
  metrics = evaluation.run(Renderer(), {})
  assert metrics["judge_acc1"] >= 0.99
  assert metrics["acc1"] >= 0.97 and metrics["acc1_unseen"] >= 0.9
  expected = {"steps": 30, "guidance": 2.0, "num_images": 128, "num_classes": 64, "templates": ["a {}"]}
  assert expected.items() <= evaluation.protocol(Renderer()).items()


@pytest.mark.slow
def test_wrong_shapes_colours_and_unseen_pairs_lower_the_accuracy(evaluation):
  colours = list(shapes.COLOURS)
  wrong_shape = evaluation.run(Renderer(lambda c, s: (c, "star" if s == "circle" else "circle")), {})
  assert wrong_shape["acc1"] <= 0.03 and wrong_shape["acc1_colour"] >= 0.98
  wrong_colour = evaluation.run(Renderer(lambda c, s: (colours[colours.index(c) - 1], s)), {})
  assert wrong_colour["acc1"] <= 0.03 and wrong_colour["acc1_shape"] >= 0.97
  wrong_unseen = evaluation.run(
    Renderer(lambda c, s: (c, "star" if s != "star" else "ring") if (c, s) in shapes.UNSEEN else (c, s)), {}
  )
  assert wrong_unseen["acc1_seen"] >= 0.97 and wrong_unseen["acc1_unseen"] <= 0.1


@pytest.mark.slow
def test_a_bad_classifier_is_refused_as_a_judge(monkeypatch):
  few = functools.partial(generation_accuracy.train_on_shapes, num_images=256)
  monkeypatch.setattr(generation_accuracy, "train_on_shapes", few)
  with pytest.raises(UserError, match="of real renders, below 98%"):
    evals.create("generation_accuracy", classifier_steps=2).run(Renderer(), {})
