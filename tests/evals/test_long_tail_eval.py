"""Compare the figures of Table 8, for a model with known embeddings, with counts by hand."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import types

import numpy as np
import pytest

from diffdis_jax.config import Run
from diffdis_jax.config import sections as stages
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import base
from diffdis_jax.evals.long_tail import GROUPS, LongTail
from diffdis_jax.parallel import sharding
from diffdis_jax.training import anchors
from replication import shapes_lt
from tests import tiny_lt
from tests.once import shared_folder

SIZE, LENGTH = 16, 16
DATA = dict(name="shapes_lt", split="test", image_size=SIZE)
CLASSES = 64


class Inference:
  """Embed a sentence by its words, and an image by its class's name plus noise; the head's logits are random."""

  image_size, max_length, protocol = SIZE, LENGTH, {"steps": 1}

  def __init__(self, labels, head=True, noise=0.6):
    self.labels, self.noise, self.done = labels, noise, 0
    self.tokenizer, self.mesh = Tokenizer(LENGTH), sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    head_size = types.SimpleNamespace(classes=CLASSES, anchors=3) if head else None
    self.network = types.SimpleNamespace(model=types.SimpleNamespace(head=head_size))
    self.logits = np.random.default_rng(1).normal(size=(len(labels), 2, CLASSES)).astype(np.float32)
    self.logits[np.arange(len(labels)), :, labels] += 2

  def embed_texts(self, params, tokens):
    vectors = np.zeros((len(tokens), 48))
    for row, vector in zip(tokens.tolist(), vectors, strict=True):
      # By position, so that sentences of the same words in another order differ: rounding alone would rank them.
      vector += sum((1 + 0.1 * i) * _vector(token) for i, token in enumerate(row[1:]) if token < 49406)
    return _unit(vectors)

  text_features = embed_texts

  def embed_images(self, params, images, *, seed):
    assert images[np.arange(2)].shape == (2, SIZE, SIZE, 3)
    own = self.labels[images.indices]
    names = self.embed_texts(params, self.tokenizer([shapes_lt.CLASSNAMES[label] for label in own]))
    return _unit(names + self.noise * np.random.default_rng(seed).normal(size=names.shape) / np.sqrt(48))

  def class_logits(self, params, images, *, seed):
    return self.logits[images.indices]


@functools.cache
def _vector(token):
  return np.random.default_rng(token).normal(size=48)


def _unit(x):
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
  """Keep the cache of tokens in a folder of the tests."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(shared_folder(tmp_path_factory) / "cache"))


@pytest.fixture(scope="module")
def measured():
  """Measure on a corpus without repeated sentences: of equal scores the order of the sums would choose."""
  evaluation, known = LongTail(data=DATA, crop_pct=1.0), set()
  sentences = tuple(
    tuple(sentence for sentence in own if not (sentence in known or known.add(sentence)))
    for own in evaluation.corpus.sentences
  )
  evaluation.corpus = dataclasses.replace(evaluation.corpus, sentences=sentences)
  inference = Inference(evaluation.labels)
  return evaluation, inference, evaluation.run(inference, {"logit_scale": 2.0})


def test_image_text_and_knn_accuracy_by_hand(measured):
  evaluation, inference, metrics = measured
  images = inference.embed_images({}, base.Images(evaluation.source, np.arange(len(evaluation.labels)), SIZE), seed=0)
  texts = inference.embed_texts({}, inference.tokenizer(evaluation.corpus.flat))
  scores, text_labels = images.astype(np.float64) @ texts.T.astype(np.float64), evaluation.corpus.labels
  order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
  image_right = text_labels[order[:, 0]] == evaluation.labels
  votes = [collections.Counter(text_labels[row].tolist()).most_common(1)[0][0] for row in order]
  knn_right = np.array(votes) == evaluation.labels
  assert metrics["image_acc"] == pytest.approx(image_right.mean(), abs=1e-12)
  assert metrics["knn_acc"] == pytest.approx(knn_right.mean(), abs=1e-12)
  text_right = evaluation.labels[scores.argmax(axis=0)] == text_labels
  assert metrics["text_acc"] == pytest.approx(text_right.mean(), abs=1e-12)
  assert 0.2 < metrics["text_acc"] < 0.95 and 0.2 < metrics["image_acc"] < 0.99


def test_groups_depend_on_the_number_of_training_images(measured):
  evaluation, inference, metrics = measured
  counts = shapes_lt.counts(0)[evaluation.labels]
  softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
  visual, language = inference.logits.astype(np.float64).swapaxes(0, 1)
  right = (0.2 * softmax(visual) + 0.8 * softmax(language)).argmax(axis=1) == evaluation.labels
  summed = (visual + language).argmax(axis=1) == evaluation.labels
  in_group = dict(
    many=counts > 99,
    median=(counts > 20) & (counts <= 99),
    low=counts <= 20,
    **{"10shot": counts <= 10, "5shot": counts <= 5},
  )
  assert metrics["acc"] == pytest.approx(right.mean())
  for group in GROUPS:
    assert metrics[f"acc_{group}"] == pytest.approx(right[in_group[group]].mean())
    assert metrics[f"acc_summed_{group}"] == pytest.approx(summed[in_group[group]].mean())
  whole = sum(metrics[f"acc_{group}"] * in_group[group].sum() for group in ("many", "median", "low"))
  assert whole / len(counts) == pytest.approx(metrics["acc"])
  assert metrics["acc"] != metrics["acc_summed"] and metrics["acc_visual"] < metrics["acc_summed"]


def test_few_anchors_are_distractors(tmp_path):
  """40 of 140 sentences are distractors; the linear loss selects less than half as many as chance would."""
  config = tiny_lt.get_config("stage=2")
  config.image_size = SIZE
  config.model.head.update(classes=CLASSES, anchors=64)
  run = Run.of(config)
  selection = anchors.Selection(dataclasses.replace(run, long_tail=stages.LongTail(crop_pct=1.0)))
  model = Inference(selection._source.labels, noise=0.3)
  chosen = selection.params(model, tmp_path, {"logit_scale": np.float32(3.0)})
  assert chosen[anchors.ANCHORS].shape == (CLASSES, 64, 48)
  shares = []
  classes = json.loads((tmp_path / "anchors.json").read_text())
  for (colour, shape), class_anchors in zip(shapes_lt.PAIRS, classes, strict=True):
    own = class_anchors["sentences"]
    assert (np.diff([anchor["loss"] for anchor in own]) >= 0).all()
    corners = shapes_lt._CORNERS[shape]
    about = {template.format(colour=colour, shape=shape, corners=corners) for template in shapes_lt.ABOUT}
    sentences = [sentence["sentence"] for sentence in own]
    shares.append(1 - np.mean([f"{colour} {shape}" in sentence or sentence in about for sentence in sentences]))
  assert np.mean(shares) < 0.5 * 40 / 140
