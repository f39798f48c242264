from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffdis_jax.app import answers as module
from diffdis_jax.data import records, transforms
from diffdis_jax.errors import UserError
from tests import studio_pictures as pictures


@pytest.fixture(autouse=True)
def small(monkeypatch):
  for name, value in {"MOST_MEGAPIXELS": 0.01, "MOST_CHARACTERS": 10, "MOST_NAMES": 3}.items():
    monkeypatch.setattr(module, name, value)


def test_an_image_is_read_as_evaluations_cut_it(tmp_path):
  path = pictures.write(tmp_path, "a.png", pictures.png(20, 10))
  expected = transforms.resize(records.read_image(pictures.png(20, 10)), 8)
  np.testing.assert_array_equal(module.read_square(path, 8), np.asarray(expected))


@pytest.mark.slow
def test_a_decoding_that_takes_too_long_is_ended(tmp_path, monkeypatch):
  path = pictures.write(tmp_path, "a.png", pictures.png(20, 10))
  monkeypatch.setattr(module, "_DECODER", module._DECODER.replace("records.read_image(", "[[] for _ in iter(int, 1)]("))
  monkeypatch.setattr(module, "DECODING", 1)
  with pytest.raises(UserError, match="the image takes more than 1 s to decode; save it again, such as a plain PNG"):
    module.read_square(path, 8)


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "the file is empty"),
    (b"no image at all", "shows no image that can be read: corrupt image; at most 0.01 million pixels of JPEG, .* can"),
    (pictures.png(20, 10)[:200], "corrupt image"),
    (pictures.png(101, 100), "101 x 100 pixels; at most 0.01 million"),
    (pictures.bomb(30_000), "too many pixels; at most 0.01 million"),
  ],
)
def test_a_bad_image_is_a_message(tmp_path, data, message):
  with pytest.raises(UserError, match=message) as caught:
    module.read_square(pictures.write(tmp_path, "bad.png", data), 8)
  assert "\n" not in str(caught.value)


def test_an_upload_that_has_gone(tmp_path):
  with pytest.raises(UserError, match="has been deleted"):
    module.read_square(str(tmp_path / "gone.png"), 8)


def test_texts_names_templates_and_numbers():
  assert module.read_text("  a star ", "prompt") == "a star"
  for text, message in ((None, "no prompt yet"), (" ", "no prompt yet"), ("x" * 1_000_000, "1,000,000 characters")):
    with pytest.raises(UserError, match=message):
      module.read_text(text, "prompt")
  assert module.read_names("cat, a dog,\n\nfox ") == ("cat", "a dog", "fox")
  assert module.read_template(" a {} ") == "a {}"
  with pytest.raises(UserError, match="no place for the class name"):
    module.read_template("a photo")
  assert module.read_whole("seed", 3.0, at_least=0, at_most=3) == 3
  for value in (None, 4, -1, float("nan"), 1.5, "2", [2]):
    with pytest.raises(UserError, match="seed is"):
      module.read_whole("seed", value, at_least=0, at_most=3)


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "there are 0 class names; type 2 to 3"),
    ("a,b,c,d", "there are 4 class names"),
    ("cat, Cat", "more than once: 'cat'"),
    ("cat, abcdefghijk", "11 characters"),
    ("x," * 500_000, "500000 class names"),
  ],
)
def test_bad_names(text, message):
  with pytest.raises(UserError, match=message):
    module.read_names(text)


def test_a_request_ends_when_its_time_is_over(monkeypatch):
  clock = itertools.count(step=4)
  monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
  assert list(module.within(10, "ab")) == ["a", "b"]
  with pytest.raises(UserError, match="longer than 10 s"):
    list(module.within(10, itertools.count()))
