"""Test the choice among hard negatives with scorers whose accuracy follows from the words of the captions."""

from __future__ import annotations

import numpy as np
import pytest

from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import tasks as evals
from replication import choice
from replication.scenes import KINDS

pytestmark = pytest.mark.slow

LENGTH = 16


class Scorer:
  """A scorer that reads an image's caption from its pixels, and embeds texts and images by `embed` of their words."""

  image_size, max_length = 32, LENGTH

  def __init__(self, source, embed):
    self.known = {source[i]["image"].tobytes(): source[i]["caption"] for i in range(len(source))}
    self.embed, self.tokenizer, self.seen = embed, Tokenizer(LENGTH), 0

  def embed_texts(self, params, tokens):
    self.seen += len(tokens)
    texts = [self.tokenizer.decode(row) for row in tokens]
    return np.stack([self.embed(text.replace("<|startoftext|>", "").split("<|endoftext|>")[0]) for text in texts])

  def embed_images(self, params, images, *, seed):
    return np.stack([self.embed(self.known[image.tobytes()]) for image in images[np.arange(len(images))]])


def bag(text):
  """Count how often each word occurs. The sums are whole numbers, so equal bags are equal to the last bit."""
  vector = np.zeros(512, np.float32)
  for word in text.split():
    vector[hash_of(word, 512)] += 1
  return vector


def whole(text):
  """Give each text an axis of its own."""
  vector = np.zeros(65536, np.float32)
  vector[hash_of(" ".join(text.split()), 65536)] = 1
  return vector


def hash_of(text, n):
  return int.from_bytes(text.encode()[-6:] + text.encode()) % (2**31 - 1) % n


@pytest.mark.parametrize("split", ["choice_val", "choice_test_unseen"])
def test_a_perfect_scorer_is_right_and_a_bag_of_words_on_half_of_the_swaps(split):
  section = dict(name="scenes", split=split, image_size=32, seed=1, num_images=160)
  evaluation, source = evals.create("choice", data=section), sources.open_source(**section)
  scorer = Scorer(source, whole)
  assert evaluation.run(scorer, {}) == {"acc1": 1.0, **{f"acc1_{kind}": 1.0 for kind in KINDS}}
  assert scorer.seen == len({text for texts in evaluation.texts for text in texts}) < 5 * 160
  metrics = evaluation.run(Scorer(source, bag), {})
  assert metrics["acc1_swapped_colours"] == metrics["acc1_swapped_objects"] == 0.5
  assert metrics["acc1_other_colour"] == metrics["acc1_other_shape"] == 1.0
  assert metrics["acc1"] == pytest.approx(1 / 3)


def test_scores_of_random_vectors_are_at_chance_and_nan_is_wrong():
  scores = np.random.default_rng(0).normal(size=(40_000, 5))
  assert choice.share_right(scores[:, :1], scores[:, 1:]) == pytest.approx(0.2, abs=0.01)
  assert choice.share_right(scores[:, :1] * np.nan, scores[:, 1:]) == 0
