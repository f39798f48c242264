"""Provide stand-ins for a trained model and for a data set."""

from __future__ import annotations

import types

import numpy as np
import pytest

from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer

SIZE = 8
LENGTH = 16


def unit(x: np.ndarray) -> np.ndarray:
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def word_vector(word: str, width: int = 64) -> np.ndarray:
  return unit(np.random.default_rng(list(word.encode())).normal(size=width))


class Source:
  """A data set whose images are of one grey value each, which is the number of the image's label."""

  def __init__(self, labels, captions=None, **fields):
    self.records = [
      {
        "image": np.full((SIZE, SIZE, 3), sorted(set(labels)).index(label), np.uint8),
        "label": label,
        "caption": captions[i] if captions else f"a photo of a {label}.",
        **{name: values[i] for name, values in fields.items()},
      }
      for i, label in enumerate(labels)
    ]

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    return self.records[index]


class Inference:
  """Embed a text as the sum of its words' vectors, and an image as the name that its grey value stands for."""

  image_size = SIZE
  max_length = LENGTH
  protocol = {"steps": 1, "num_noise_samples": 1, "guidance": 1.0}
  generation_protocol = {"steps": 50, "guidance": 7.5}

  def __init__(self, names, noise=0.0):
    self.names = sorted(set(names))
    self.scale = noise
    self.tokenizer = Tokenizer(LENGTH)
    self.seeds = []

  def embed_texts(self, params, tokens):
    assert tokens.dtype == np.int32 and tokens.shape[1] == LENGTH
    sums = [sum(map(word_vector, self.words(row)), start=np.zeros(64)) for row in tokens]
    return unit(np.stack(sums))

  def words(self, row):
    text = self.tokenizer.decode(row)
    for sign in ("<|startoftext|>", "<|endoftext|>", ".", ","):
      text = text.replace(sign, " ")
    return text.split()

  def embed_images(self, params, images, *, seed):
    images = images[np.arange(len(images))]
    assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
    self.seeds.append(seed)
    names = [self.names[value] for value in images[:, 0, 0, 0]]
    exact = np.stack([sum(map(word_vector, name.split())) for name in names])
    return unit(exact + self.scale * np.random.default_rng(seed).normal(size=exact.shape))


class Cheat(Inference):
  """Ignore the pixels and know the labels by their order, like a model that was given the true captions."""

  def __init__(self, names, labels):
    super().__init__(names)
    self.labels = labels

  def embed_images(self, params, images, *, seed):
    return unit(np.stack([sum(map(word_vector, label.split())) for label in self.labels]))


@pytest.fixture
def use(monkeypatch):
  """Return a function that makes `sources.open_source` return these data: use(train=Source, test=Source)."""

  def patch(**by_split):
    monkeypatch.setattr(sources, "open_source", lambda *, split: by_split[split])

  return patch


@pytest.fixture
def fakes():
  return types.SimpleNamespace(Source=Source, Inference=Inference, Cheat=Cheat)
