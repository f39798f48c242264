"""Test that long-tailed batches have the right shares of classes, for any number of hosts and after a resume."""

import collections

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from scipy import stats

from diffdis_jax.config.data import Loading
from diffdis_jax.data.loader import SUBSTITUTED, labelled_loader
from diffdis_jax.data.long_tail import Tokens
from diffdis_jax.data.records import REASONS, Unusable

COUNTS = (400, 100, 36, 9, 1)
STARTS = np.array([0, 3, 4, 9, 11, 12])


class Source:
  """A source in shuffled order. An image's pixels hold its label; images with an index in `unusable` cannot be read."""

  def __init__(self, unusable=()):
    self.labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
    self.classnames = tuple("abcde")
    self.unusable = set(unusable)

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    if index in self.unusable:
      raise Unusable(REASONS[0])
    return {"image": np.full((4, 4, 3), self.labels[index], np.uint8), "label": int(self.labels[index]), "index": index}


def make(source=None, sampling_exponent=0.5, batch_size=8, **settings):
  tokens = Tokens(np.stack([np.arange(12), np.arange(12)], axis=1).astype(np.int32), STARTS)
  settings = {"tokens": tokens, "image_size": 4, "seed": 3, "num_threads": 0, **settings}
  how = {name: settings.pop(name) for name in ("num_threads", "num_workers", "prefetch") if name in settings}
  settings["loading"] = Loading(**how)
  return labelled_loader(source or Source(), sampling_exponent=sampling_exponent, batch_size=batch_size, **settings)


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_classes_have_their_shares(power):
  """A chi-square test compares the labels with shares of n^power; a power of 0.5 is square-root sampling."""
  labels = np.concatenate([batch["label"] for batch in take(make(sampling_exponent=power, batch_size=500), 8)])
  shares = np.array(COUNTS, float) ** power
  expected = len(labels) * shares / shares.sum()
  drawn = np.bincount(labels, minlength=len(COUNTS))
  assert stats.chisquare(drawn, expected).pvalue > 0.01
  other = len(labels) * np.array(COUNTS, float) ** (power + 0.3)
  assert stats.chisquare(drawn, other / other.sum() * len(labels)).pvalue < 1e-6


def test_images_of_a_class_are_drawn_with_equal_probability():
  class Indexed(Source):
    def __getitem__(self, index):
      image = np.full((4, 4, 3), [index // 256, index % 256, 0], np.uint8)
      return {"image": image, "label": int(self.labels[index])}

  batches = take(make(Indexed(), batch_size=500), 8)
  images = np.concatenate([batch["image"][:, 0, 0].astype(int) for batch in batches])
  indices, labels = images[:, 0] * 256 + images[:, 1], np.concatenate([batch["label"] for batch in batches])
  draws_of_class_1 = collections.Counter(indices[labels == 1].tolist())
  assert len(draws_of_class_1) > 95
  assert stats.chisquare([draws_of_class_1[i] for i in np.flatnonzero(Indexed().labels == 1)]).pvalue > 0.01


def test_image_label_and_sentence_belong_together():
  for batch in take(make(), 10):
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    sentence = batch["tokens"][:, 0]
    assert (STARTS[batch["label"]] <= sentence).all() and (sentence < STARTS[batch["label"] + 1]).all()
  assert "tokens" not in next(make(tokens=None))


def test_any_number_of_hosts_has_the_same_batches():
  whole = take(make(), 4)
  for rows in ([0, 2, 4, 6], [1, 3, 5, 7], [5]):
    for batch, part in zip(whole, take(make(rows=rows), 4), strict=True):
      for name, value in part.items():
        np.testing.assert_array_equal(value, batch[name][rows])


@pytest.mark.parametrize("threads", [0, 3])
def test_a_restored_iterator_continues_with_the_next_batch(tmp_path, threads):
  iterator = make(num_threads=threads)
  take(iterator, 3)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    manager.wait_until_finished()
    expected = take(iterator, 3)
    resumed = make(num_threads=threads)
    manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
  for batch, other in zip(expected, take(resumed, 3), strict=True):
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])


def test_an_unusable_image_is_replaced_by_one_of_its_class():
  source = Source(unusable=range(0, 500, 2))
  batches = take(make(source), 5)
  assert sum(batch[SUBSTITUTED].sum() for batch in batches) > 0
  for batch in batches:
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
