from __future__ import annotations

import dataclasses
import itertools
import os

import numpy as np
import pytest

from diffdis_jax.app import limits as module
from diffdis_jax.app.limits import Limits
from diffdis_jax.data import records, transforms
from diffdis_jax.errors import UserError
from tests import studio_pictures as pictures

LIMITS = Limits(upload_mb=0.2, megapixels=0.01, characters=10, names=3)


def test_an_image_is_read_as_evaluations_cut_it(tmp_path):
  path = pictures.write(tmp_path, "a.png", pictures.png(20, 10))
  square = module.read_square(path, LIMITS, 8)
  expected = transforms.resize(records.read_image(pictures.png(20, 10)), 8)
  np.testing.assert_array_equal(square, np.asarray(expected))


def test_a_decoding_that_takes_too_long_is_ended(tmp_path, monkeypatch):
  path = pictures.write(tmp_path, "a.png", pictures.png(20, 10))
  endless = module._DECODER.replace("records.read_image(", "[[] for _ in iter(int, 1)](")
  monkeypatch.setattr(module, "_DECODER", endless)
  monkeypatch.setattr(module, "DECODING", 1)
  with pytest.raises(UserError, match="the image takes more than 1 s to decode; save it again, such as a plain PNG"):
    module.read_square(path, LIMITS, 8)
  with pytest.raises(UserError, match="the image was not decoded within 0.05 s; try again later"):
    module.read_square(path, dataclasses.replace(LIMITS, seconds=0.05), 8)


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "the file is empty"),
    (
      b"no image at all",
      "shows no image that can be read: corrupt image; at most 0.01 million pixels of JPEG, .* can be",
    ),
    (pictures.png(20, 10)[:200], "corrupt image"),
    (pictures.png(20, 1), "one pixel's width"),
    (b"\x00" * 200_001, r"has 0.2 MB; at most 0.2 MB"),
    (pictures.png(101, 100), "101 x 100 pixels; at most 0.01 million"),
    (pictures.bomb(12_000), "too many pixels; at most 0.01 million|12,000 x 12,000 pixels"),
    (pictures.bomb(30_000), "too many pixels; at most 0.01 million"),
  ],
)
def test_a_bad_image_is_a_message(tmp_path, data, message):
  with pytest.raises(UserError, match=message) as caught:
    module.read_square(pictures.write(tmp_path, "bad.png", data), LIMITS, 8)
  assert "\n" not in str(caught.value)


def test_no_image_or_one_that_has_gone(tmp_path):
  with pytest.raises(UserError, match="no image yet"):
    module.read_square(None, LIMITS, 8)
  with pytest.raises(UserError, match="cannot be read"):
    module.read_square(str(tmp_path / "gone.png"), LIMITS, 8)


def test_texts():
  assert module.read_text("  a star ", "prompt", LIMITS) == "a star"
  for text, message in ((None, "no prompt yet"), (" ", "no prompt yet"), ("x" * 1_000_000, "1,000,000 characters")):
    with pytest.raises(UserError, match=message):
      module.read_text(text, "prompt", LIMITS)


def test_names_stand_between_commas_or_on_lines():
  assert module.read_names("cat, a dog,\n\nfox ", LIMITS) == ("cat", "a dog", "fox")


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "there are 0 class names; type 2 to 3"),
    ("cat", "there are 1 class names"),
    ("a,b,c,d", "there are 4 class names"),
    ("cat, Cat", "more than once: 'cat'"),
    ("cat, abcdefghijk", "11 characters"),
    ("x," * 500_000, "1,000,000 characters"),
  ],
)
def test_bad_names(text, message):
  with pytest.raises(UserError, match=message):
    module.read_names(text, LIMITS)


def test_templates_and_numbers():
  assert module.read_template(" a {} ", LIMITS) == "a {}"
  with pytest.raises(UserError, match="no place for the class name"):
    module.read_template("a photo", LIMITS)
  assert module.read_whole("seed", 3.0, at_least=0, at_most=3) == 3
  for value in (None, 4, -1, float("nan"), 1.5, "2", [2]):
    with pytest.raises(UserError, match="seed is"):
      module.read_whole("seed", value, at_least=0, at_most=3)


def test_a_request_ends_when_its_time_is_over(monkeypatch):
  clock = itertools.count(step=4)
  monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
  seen = []
  with pytest.raises(UserError, match="longer than 10 s"):
    seen.extend(module.within(10, itertools.count()))
    seen.append("the end")
  clock = itertools.count(step=4)
  assert list(module.within(10, "ab")) == ["a", "b"]
  clock = itertools.count(step=4)
  assert module.last_within(10, "ab") == "b"
  with pytest.raises(UserError, match="longer than 10 s"):
    module.last_within(10, "abcde")


@pytest.mark.parametrize("field", ["upload_mb", "megapixels", "characters", "names", "seconds", "waiting"])
def test_limits_out_of_their_range(field):
  with pytest.raises(UserError, match=f"{field} is 0"):
    Limits(**{field: 0})


@pytest.mark.parametrize("host", ["127.0.0.1", "", "::1", "[::1]"])
def test_a_free_port(host):
  with module.listen(host, 0) as listener:
    assert listener.getsockname()[1] > 0


@pytest.mark.parametrize("host, message", [("192.0.2.1", "Cannot assign requested address"), ("ü" * 99, "hostname")])
def test_where_this_machine_is_not(host, message):
  with pytest.raises(UserError, match=f"cannot listen at {host}, port 0: .*({message}|label).*; take another"):
    module.listen(host, 0)


def test_the_folder_of_uploads_is_there_for_a_while(tmp_path, monkeypatch):
  monkeypatch.setenv(module.FOLDER, str(tmp_path / "given"))
  with pytest.raises(KeyboardInterrupt), module.uploads():
    (made,) = (tmp_path / "given").iterdir()
    assert os.environ[module.FOLDER] == str(made)
    (made / "hash").mkdir()
    (made / "hash" / "a.png").write_bytes(b"a")
    raise KeyboardInterrupt
  assert os.listdir(tmp_path / "given") == [] and os.environ[module.FOLDER] == str(tmp_path / "given")
  monkeypatch.delenv(module.FOLDER)
  with module.uploads():
    made = os.environ[module.FOLDER]
  assert not os.path.exists(made) and module.FOLDER not in os.environ
