"""Test the judge of rendered scenes with generators that render what they are asked for, or something else."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import tasks as evals
from replication import scene_judge, scenes
from replication.scenes import CONVERSES, RELATIONS, Scene

pytestmark = pytest.mark.slow

STAR, RING, HEART = ("red", "star"), ("blue", "ring"), ("green", "heart")


@pytest.fixture(scope="module", autouse=True)
def compiled_well() -> Iterator[None]:
  """Let the compiler optimise: the judge's training takes longer than its compiling."""
  quick = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", quick)


def scene_of(text: str) -> Scene:
  """Return the scene that a caption describes."""
  words = text.split()
  first, second, relation = (words[1], words[2]), (words[-2], words[-1]), " ".join(words[3:-3])
  if relation in RELATIONS:
    return Scene(first, second, relation)
  return Scene(second, first, next(own for own, other in CONVERSES.items() if other == relation))


class Renderer:
  """This generator renders the scene of the prompt, or what `instead` makes of it."""

  image_size, max_length, aligned = 32, 16, False
  generation_protocol = {"steps": 30, "guidance": 2.0}

  def __init__(self, instead=lambda scene: scene):
    self.instead = instead

  def noise(self, n, seed):
    return np.full((n, 4, 4, 4), seed, np.float32)

  def generate(self, params, tokens, noise):
    texts, rng = map(Tokenizer(self.max_length).decode, tokens), np.random.default_rng(99)
    prompts = [text.replace("<|startoftext|>", "").split("<|endoftext|>")[0] for text in texts]
    return np.stack([scenes.render(self.instead(scene_of(text)), image_size=32, rng=rng) for text in prompts])


def test_what_is_right_of_five():
  asked = Scene(STAR, RING, "left of")
  expected = {
    asked: 5,
    asked.swapped_objects: 4,  # "a red star right of a blue ring": the relation alone is wrong
    asked.swapped_colours: 3,
    Scene(STAR, RING, "above"): 4,
    Scene(RING, STAR, "above"): 4,
    Scene(STAR, HEART, "left of"): 3,
    Scene(HEART, STAR, "left of"): 2,  # found in the other's place, where the relation is wrong too
    Scene(STAR, ("blue", "heart"), "left of"): 4,
    Scene(HEART, HEART, "above"): 0,
  }
  judged = np.array([scene_judge.attributes_of(scene) for scene in expected])
  right = scene_judge.right(judged, np.tile(scene_judge.attributes_of(asked), (len(judged), 1)))
  assert right.sum(axis=1).tolist() == [*expected.values()]
  assert right[1].tolist() == [False, True, True, True, True]


@pytest.fixture(scope="module", params=["val", "test_unseen"])
def evaluation(request):
  data = dict(name="scenes", split=request.param, image_size=32, seed=1, num_images=256)
  return evals.create("generation_accuracy", data=data)


def test_renders_of_what_was_asked_for_are_right(evaluation):
  metrics = evaluation.run(Renderer(), {})
  assert metrics["judge_acc1"] >= 0.99 and metrics["acc1"] >= 0.98 and metrics["acc1_attributes"] >= 0.99
  assert evaluation.protocol(Renderer())["judge"] == {"steps": 400, "split": evaluation.named_by.protocol()["split"]}
  assert evaluation.protocol(Renderer())["num_images"] == 256
