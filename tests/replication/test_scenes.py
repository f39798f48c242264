"""Test which scenes are held out, what captions say, and that scoring texts alone cannot solve the swaps."""

import collections
import hashlib

import numpy as np
import pytest

from diffdis_jax.data import shapes
from diffdis_jax.errors import UserError
from replication import scenes
from replication.scenes import SPLITS, scenes_of
from tests.data.test_loader import Numbered, take
from tests.data.test_loader import make as make_loader

pytestmark = pytest.mark.slow

MEASURED = [split for split in SPLITS if split not in ("train", "all")]
CHOICES = [split for split in SPLITS if split.startswith("choice_")]


def make(split, **settings):
  return scenes.Scenes(split=split, image_size=32, **settings)


def fields(split, n=None):
  source = make(split, num_images=n)
  return [source.fields(i) for i in range(len(source))]


def pairs_of(caption):
  words = caption.split()
  return tuple(words[1:3]), tuple(words[-2:])


def test_two_pairs_of_each_colour_and_shape_are_held_out():
  assert len(set(scenes.UNSEEN)) == 16 and len(scenes.SEEN) == 48
  for part in (0, 1):
    counts = collections.Counter(pair[part] for pair in scenes.UNSEEN)
    assert len(counts) == 8 and set(counts.values()) == {2}
  assert {*shapes.UNSEEN} < {*scenes.UNSEEN}


def test_training_has_no_pair_that_is_held_out():
  named = {pair for scene in scenes_of("train") for pair in (scene.first, scene.second)}
  assert named == {*scenes.SEEN} and len(scenes_of("train")) == len({*scenes_of("train")}) == 3552


@pytest.mark.parametrize("split", MEASURED)
def test_what_is_measured_has_one_unseen_pair_or_none(split):
  assert {scene.unseen for scene in scenes_of(split)} == {int(split.endswith("_unseen"))}
  assert {record["seen"] for record in fields(split, 64)} == {not split.endswith("_unseen")}


@pytest.mark.parametrize("split", scenes.MEASURED)
def test_1024_captions_differ_and_no_two_mean_the_same(split):
  assert SPLITS[split] == 1024
  texts = [caption for record in fields(split) for caption in record["captions"]]
  assert len(set(texts)) == 2 * 1024


@pytest.mark.parametrize("split", CHOICES)
def test_a_score_of_texts_alone_is_right_on_half_of_the_swaps(split):
  """Such a score may be a bag of words or a random number for each text. A tie counts one half."""
  records = fields(split, len(scenes_of(split)))
  assert SPLITS[split] == 4096 and len(records) % scenes.ORBIT == 0
  bag = lambda text: sum(hashlib.sha256(word.encode()).digest()[0] for word in text.split())
  seen_pairs = lambda text: sum(pair in scenes.SEEN for pair in pairs_of(text))
  random = lambda text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
  for score in (bag, seen_pairs, random):
    for kind in ("swapped_colours", "swapped_objects"):
      own, other = ([score(text) for text in texts] for texts in _truths_and(kind, records))
      assert np.mean(np.sign(np.subtract(own, other))) == 0.0
  # The pairs seen in training do not distinguish the other negatives either.
  for kind in scenes.KINDS:
    assert all(seen_pairs(own) == seen_pairs(other) for own, other in zip(*_truths_and(kind, records), strict=True))


def _truths_and(kind, records):
  return [record["caption"] for record in records], [record["negatives"][kind] for record in records]


@pytest.mark.parametrize("image_size", [32, 64])
def test_every_image_shows_its_scene(image_size):
  """Each colour's pixels are on the side that the caption says. Shapes do not touch and do not leave the image."""
  assert scenes.OFF_CENTRE + scenes.APART[1] + scenes.RADIUS[1] <= 0.5 + 1e-9 and scenes.APART[0] >= scenes.RADIUS[1]
  rng = np.random.default_rng(0)
  for scene in scenes_of("train")[::7]:
    image = scenes.render(scene, image_size=image_size, rng=rng).astype(int)
    assert image.shape == (image_size, image_size, 3)
    middles = []
    for colour, _ in (scene.first, scene.second):
      near = np.abs(image - shapes.COLOURS[colour]).max(-1) <= shapes.COLOUR_JITTER + 1
      assert near.sum() > 0.1 * (0.18 * image_size) ** 2
      middles.append(np.argwhere(near).mean(axis=0) / image_size)
    apart = middles[1] - middles[0]  # rows, columns
    along, across = (apart[1], apart[0]) if scene.relation == "left of" else (apart[0], apart[1])
    assert along > 0.3 and abs(across) < along


def test_a_record_depends_on_seed_split_and_index_alone():
  first, second = make("train")[500], make("train", num_images=501)[500]
  np.testing.assert_array_equal(first.pop("image"), second.pop("image"))
  assert first == second == make("train").fields(500)
  again = 500 + len(scenes_of("train"))
  images = [make("train")[500], make("train")[again], make("train", seed=1)[500]]
  assert len({image["image"].tobytes() for image in images}) == 3
  assert {frozenset(image["captions"]) for image in images} == {frozenset(first["captions"])}
  with pytest.raises(IndexError):
    make("train", num_images=5)[5]


def test_records_that_belong_together_stay_together_in_every_epoch():
  class Fours(Numbered):
    def order(self, seed):
      return scenes.in_runs(len(self), 4, seed)

  batches = take(make_loader(Fours(), image_size=8, num_threads=2), 10)
  order = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).reshape(3, 10, 4)
  np.testing.assert_array_equal(order, order[:, :, :1] + np.arange(4))
  runs = order[:, :, 0] // 4
  for epoch in runs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in runs.tolist()}) == 3
  parts = [next(make_loader(Fours(), image_size=8, rows=range(i, 12, 2)))["image"] for i in range(2)]
  np.testing.assert_array_equal(np.stack(parts, 1).reshape(batches[0]["image"].shape), batches[0]["image"])
  Fours.__len__ = lambda _: 38
  with pytest.raises(UserError, match="num_images is 38; .* 4 at a time: take a multiple of 4"):
    make_loader(Fours())
