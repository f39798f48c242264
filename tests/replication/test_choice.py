"""Choice among hard negatives: scorers whose accuracy is known, from the words of the scenes' captions."""

from __future__ import annotations

import numpy as np
import pytest

from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks as evals
from replication import choice
from replication.scenes import KINDS

pytestmark = pytest.mark.slow

LENGTH = 16


class Scorer:
  """Of an image it knows the caption, by its pixels; texts and images become what `embed` makes of their words."""

  image_size, max_length = 32, LENGTH
  protocol = {"steps": 1, "num_noise_samples": 1, "guidance": 1.0}

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
  """How often each word occurs: sums of whole numbers, so that equal bags are equal to the last bit."""
  vector = np.zeros(512, np.float32)
  for word in text.split():
    vector[hash_of(word, 512)] += 1
  return vector


def whole(text):
  """Another axis for another text, if few."""
  vector = np.zeros(65536, np.float32)
  vector[hash_of(" ".join(text.split()), 65536)] = 1
  return vector


def hash_of(text, n):
  return int.from_bytes(text.encode()[-6:] + text.encode()) % (2**31 - 1) % n


@pytest.fixture(scope="module", params=["choice_val", "choice_test_unseen"])
def section(request):
  return dict(name="scenes", split=request.param, image_size=32, seed=1, num_images=160)


def measure(section, embed, **settings):
  evaluation = evals.create("choice", data=section, **settings)
  scorer = Scorer(sources.open_source(**section), embed)
  return evaluation.run(scorer, {}), evaluation, scorer


def test_a_perfect_scorer_is_always_right(section):
  metrics, evaluation, scorer = measure(section, whole)
  assert metrics == {"acc1": 1.0, **{f"acc1_{kind}": 1.0 for kind in KINDS}}
  assert scorer.seen == len({text for texts in evaluation.texts for text in texts}) < 5 * 160


def test_a_bag_of_words_is_right_on_half_of_the_swaps_and_on_all_others(section):
  metrics, _, _ = measure(section, bag)
  assert metrics["acc1_swapped_colours"] == metrics["acc1_swapped_objects"] == 0.5
  assert metrics["acc1_other_colour"] == metrics["acc1_other_shape"] == 1.0
  assert metrics["acc1"] == pytest.approx(1 / 3)


def test_a_scorer_that_says_one_thing_is_at_chance(section):
  metrics, _, _ = measure(section, lambda text: np.ones(4, np.float32))
  assert metrics == pytest.approx({"acc1": 0.2, **{f"acc1_{kind}": 0.5 for kind in KINDS}})


def test_a_scorer_of_nothing_is_wrong(section):
  metrics, _, _ = measure(section, lambda text: np.full(4, np.nan, np.float32))
  assert {*metrics.values()} == {0.0}


def test_the_leak_test_shows_other_images(section):
  """Eight scenes of an orbit follow each other; another one's image is nearly always of other words."""
  metrics, evaluation, scorer = measure(section, bag, shuffle_labels=True)
  assert metrics["acc1_swapped_colours"] == 0.5 and metrics["acc1"] < 0.4
  assert evaluation.protocol(scorer)["shuffle_labels"] is True


def test_captions_that_are_longer_than_the_network_reads_are_named(monkeypatch, caplog):
  """The two become one text, and the choice between them chance."""
  long = " ".join(["dog"] * 14)
  record = {"image": np.zeros((32, 32, 3), np.uint8), "caption": f"{long} red", "negatives": {"colour": f"{long} grey"}}
  monkeypatch.setattr(sources, "open_source", lambda **section: [record])
  metrics, _, _ = measure({"name": "own"}, whole)
  assert metrics["acc1"] == 0.5
  found = [message for message in caplog.messages if "tokens" in message]
  assert found == [f"this run reads 14 tokens: of {f'{long} {word}'!r} it sees {long!r}" for word in ("red", "grey")]


def test_scores_of_random_vectors_are_at_chance():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(40_000, 5))
  assert choice.share_right(scores[:, :1], scores[:, 1:]) == pytest.approx(0.2, abs=0.01)
  brute = np.mean([row[0] == max(row) for row in scores[:500].tolist()])
  assert choice.share_right(scores[:500, :1], scores[:500, 1:]) == brute


def test_the_protocol_names_the_split(section):
  evaluation = evals.create("choice", data=section)
  expected = {"steps": 1, "split": section["split"], "num_images": 160, "kinds": [*KINDS]}
  assert expected.items() <= evaluation.protocol(Scorer).items()


@pytest.mark.parametrize(
  "records, message",
  [
    ([{"caption": "a"}], "records have no field 'negatives'; they have caption"),
    ([{"caption": "a", "negatives": "b"}], "field 'negatives' of record 0 holds 'b'; it should be kind -> false cap"),
    ([{"caption": "a", "negatives": {}}], "record 0 has negatives of kinds none"),
    (
      [{"caption": "a", "negatives": {"x": "b"}}, {"caption": "a", "negatives": {"y": "b"}}],
      "record 1 has negatives of kinds y, not x",
    ),
  ],
)
def test_records_without_negatives(records, message, monkeypatch):
  monkeypatch.setattr(sources, "open_source", lambda **section: records)
  with pytest.raises(UserError, match=message):
    choice.Choice(data={})
