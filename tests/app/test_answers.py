"""Test the tabs' answers with a model whose queries are colours."""

from __future__ import annotations

import io
import socket
import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.special
from PIL import Image

from diffdis_jax.app import __main__ as app
from diffdis_jax.app import answers, step_sampler
from diffdis_jax.app.__main__ import open_data
from diffdis_jax.app.step_sampler import Frame
from diffdis_jax.common import storage
from diffdis_jax.config import Run
from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from replication.configs import emoji
from tests import studio_pictures as pictures

RNG = np.random.default_rng(0)


def unit(x: np.ndarray) -> np.ndarray:
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class StepSampler(step_sampler.StepSampler):
  """A model whose query is the mean colour of an image, or the colour that a text names."""

  COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
  temperature = 3.0
  seconds = 120.0

  def __init__(self):
    self.network = SimpleNamespace(image_size=8, is_clip=False)
    self.model = SimpleNamespace(batch_size=2)
    self.closed, self.tokenizer = threading.Event(), Tokenizer(8)

  def text_queries(self, texts):
    return unit(np.array([next(c for name, c in self.COLOURS.items() if name in text) for text in texts]))

  def embed_images(self, images, *, seed):
    return unit(np.stack([images[np.array([i])][0] for i in range(len(images))]).mean(axis=(1, 2)) + 1e-3)

  def generate(self, prompt, *, seed, steps, guidance_scale, frames, place):
    for step in range(1, steps + 1):
      yield Frame(step, 999 - step, np.full((8, 8, 3), 10 * place + step, np.uint8))


class Source:
  """A data source whose images are squares of one colour."""

  def __init__(self, *colours):
    self.colours = colours

  def __len__(self):
    return len(self.colours)

  def __getitem__(self, index):
    pixels = np.broadcast_to(np.array(StepSampler.COLOURS[self.colours[index]], np.uint8) * 255, (8, 8, 3))
    return {"image": np.ascontiguousarray(pixels), "caption": f"<{self.colours[index]}>"}


def colour(tmp_path, name: str) -> str:
  buffer = io.BytesIO()
  Image.fromarray(Source(name)[0]["image"]).save(buffer, format="PNG")
  return pictures.write(tmp_path, f"{name}.png", buffer.getvalue())


def test_an_image_is_classified(tmp_path):
  ((line, shares),) = answers.classify(StepSampler(), colour(tmp_path, "red"), "red, green,blue", "a {}", 0)
  texts = np.eye(3, dtype=np.float32)  # of red, green and blue
  expected = scipy.special.softmax(3.0 * unit(np.array([255, 0, 0]) + 1e-3) @ texts.T)
  np.testing.assert_allclose([shares[name] for name in ("red", "green", "blue")], expected, rtol=1e-5)
  assert line == f"red: {expected[0]:.1%}."


def test_images_are_generated_one_after_another():
  shown = [*answers.generate(StepSampler(), " a star ", 2, 7, 2, 2)]
  assert [line for line, _ in shown] == [
    "Image 1 of 2, step 1 of 2, t = 998.",
    "1 of 2, seed 7, 2 steps.",
    "Image 2 of 2, step 1 of 2, t = 998.",
    "2 of 2, seed 7, 2 steps.",
  ]
  assert [[image.mean() for image, _ in images] for _, images in shown] == [[1], [2], [2, 11], [2, 12]]
  assert {caption for _, images in shown for _, caption in images} == {"a star"}
  with pytest.raises(UserError, match="images"):
    next(answers.generate(StepSampler(), "a star", 9, 7, 2, 2))


def test_the_likeliest_name_becomes_a_prompt():
  assert answers.likeliest({"label": "red star", "confidences": []}, "a {}") == "a red star"
  for answer in (None, {}, "red star"):
    with pytest.raises(UserError, match="classify an image"):
      answers.likeliest(answer, "a {}")


def test_a_generation_says_what_is_read_of_a_prompt_that_is_too_long():
  steps = answers.generate(StepSampler(), "one two three four five six seven", 1, 0, 3, 2)
  assert all(line.endswith("too long for this model, which reads: one two three four five six") for line, _ in steps)


def test_images_are_found_by_text_and_by_image(tmp_path):
  sampler = StepSampler()
  index = answers.Index(sampler, Source("red", "green", "blue", "green", "red"), None)
  with pytest.raises(UserError, match="no image is embedded yet"):
    index.nearest(sampler.text_queries(["green"])[0], 2)
  index.fill()
  assert index.state() == "5 images are searched."
  assert sorted(index.nearest(sampler.text_queries(["green"])[0], 2)) == [1, 3]
  for _, images in (
    *answers.search_text(sampler, index, "a green one"),
    *answers.search_image(sampler, index, colour(tmp_path, "green")),
  ):
    assert [tuple(image[0, 0]) for image, _ in images][:2] == [(0, 255, 0)] * 2
    assert [caption.split()[0] for _, caption in images][:2] == ["<green>"] * 2


def test_images_to_search_are_those_of_classification_where_they_can_be_opened(monkeypatch, caplog):
  """The emoji config's first evaluation by name uses generated images, so its data are the training data."""
  evals = dict(sorted(Run.of(emoji.get_config("path=P")).to_dict()["evals"].items()))  # in the order of config.json
  assert min(evals) == "drawn" and evals["drawn"]["data"]["split"] == "train"
  monkeypatch.setattr(sources, "open_source", lambda **section: section)
  opened: Any = open_data(evals, None, None, image_size=32)
  assert opened["split"] == "val_vendor"
  monkeypatch.setattr(sources, "open_source", mock.Mock(side_effect=ConnectionError("no route to the bucket")))
  assert open_data(evals, None, None, image_size=32) is None
  assert "no images to search: no route to the bucket; give --data and --split" in caplog.text
  with pytest.raises(ConnectionError):  # the user asked for this data set
    open_data({}, "gs://bucket/data", "val", image_size=8)


def test_a_data_set_that_is_away_while_it_is_embedded_ends_the_search_with_a_reason(caplog):
  reason = "the data could not be read for 300 s: no route to the bucket"

  class Away(Source):
    readable = 3

    def __getitem__(self, index):
      if index >= self.readable:
        raise storage.Away(reason)
      return super().__getitem__(index)

  source, sampler = Away("red", "green", "blue", "red", "red"), StepSampler()
  index = answers.Index(sampler, source, None)
  index.fill()
  assert index.state() == f"2 of 5 images are searched so far. {reason}"
  assert f"the search ends after 2 images: {reason}" in caplog.text
  source.readable = 0
  with pytest.raises(UserError, match=reason):
    list(answers.search_text(sampler, index, "a green one"))


def test_a_taken_port_is_known_before_the_run_is_looked_for():
  with socket.create_server(("127.0.0.1", 0)) as second:
    port = second.getsockname()[1]
    with pytest.raises(UserError, match=f"^cannot listen at 127.0.0.1, port {port}: Address already in use; take "):
      app.listen("127.0.0.1", port)
