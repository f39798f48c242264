"""Copies of training images among generated ones, beside the judge of labelled images."""

from __future__ import annotations

import numpy as np
import pytest

from diffdis_jax.data import sources
from diffdis_jax.evals import base, generation_accuracy
from diffdis_jax.evals import tasks as evals
from replication import label_judge
from tests.replication.test_label_judge import SPLITS, Painter, paint

pytestmark = pytest.mark.slow


@pytest.fixture
def evaluation(monkeypatch):
  """Of the colours of `train`; a fourth one is in `other` alone, from which the judge learns too."""
  monkeypatch.setattr(sources, "open_source", lambda **section: SPLITS[section["split"]])
  return evals.create("generation_accuracy", data={"split": "train"}, splits=("other",), template="a {}", per_class=5)


def test_copies_of_training_images_are_counted(evaluation, monkeypatch):
  """A generator that returns training images has a share of 1; one of new discs that of real images, by brute force."""
  training = np.stack([base.to_square(record["image"], 32) for record in SPLITS["train"]])
  names = [record["label"] for record in SPLITS["train"]]
  others = np.stack([base.to_square(record["image"], 32) for record in SPLITS["other"] if record["label"] != "grey"])

  def share(images, labels):
    distance = lambda a, b: ((a.astype(int) - b.astype(int)) ** 2).sum()
    own = {name: training[[i for i, other in enumerate(names) if other == name]] for name in {*names}}
    least = {name: min(distance(a, b) for i, a in enumerate(x) for b in x[:i]) for name, x in own.items()}
    return np.mean([min(distance(image, x) for x in training) < least[k] for image, k in zip(images, labels)])

  monkeypatch.setattr(label_judge, "classify", lambda model, images: np.zeros((len(images), 4), np.float32))
  monkeypatch.setattr(evaluation.named_by, "_trained", generation_accuracy.Trained(None, {}))
  painter = Painter()
  metrics = evaluation.run(painter, {})
  fresh = [base.to_square(paint(name, 1000 + i), 32) for i, name in enumerate(painter.asked)]
  assert metrics["nearer_than_own"] == pytest.approx(share(fresh, painter.asked))
  assert metrics["real_nearer_than_own"] == pytest.approx(share(others, ["red"] * len(others)))
  monkeypatch.setattr(
    painter, "generate", lambda params, tokens, noise: np.stack([record["image"] for record in SPLITS["train"]][:15])
  )
  assert evaluation.run(painter, {})["nearer_than_own"] == 1.0
