"""Embedded texts on disk: found for the same weights and prompts alone, and never trusted where they are damaged."""

from __future__ import annotations

import importlib.metadata
import os
import types

import numpy as np
import pytest

from diffdis_jax.evals import text_cache
from diffdis_jax.evals.text_cache import CachedTexts
from tests.changed_code import change, copy_package


class Inference:
  """Counts what it is asked for."""

  max_length = 7

  def __init__(self, dtype="float32", activation="gelu"):
    text_encoder = types.SimpleNamespace(activation=activation)
    model = types.SimpleNamespace(dtype=dtype, matmul_precision="auto", text_encoder=text_encoder)
    self.network = types.SimpleNamespace(model=model)
    self.calls = 0

  def embed_texts(self, params, tokens):
    self.calls += 1
    return np.stack([np.float32(params["scale"]) * tokens.sum(axis=1), tokens[:, 0]], axis=1).astype(np.float32)


TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4)
PARAMS = {"scale": 2.0}


def embed(folder, *, weights="w", tokens=TOKENS, **model):
  """(what is embedded, how often the network ran)."""
  inference = Inference(**model)
  return CachedTexts(inference, folder, weights).embed_texts(PARAMS, tokens), inference.calls


def test_the_same_weights_and_tokens_are_found_again_bit_for_bit(tmp_path):
  first, again = embed(tmp_path / "new"), embed(tmp_path / "new")
  assert (first[1], again[1]) == (1, 0)
  np.testing.assert_array_equal(again[0], first[0])
  assert again[0].dtype == np.float32


@pytest.mark.parametrize(
  "other",
  [
    dict(weights="v"),
    dict(tokens=TOKENS + 1),
    dict(tokens=TOKENS.reshape(4, 3)),
    dict(dtype="bfloat16"),
    dict(activation="quick_gelu"),
  ],
)
def test_others_are_embedded_anew(tmp_path, other):
  embed(tmp_path)
  found, calls = embed(tmp_path, **other)
  assert calls == 1
  np.testing.assert_array_equal(found, Inference().embed_texts(PARAMS, other.get("tokens", TOKENS)))


def test_texts_are_embedded_anew_by_changed_code(tmp_path, monkeypatch):
  copy = copy_package(tmp_path, monkeypatch)
  embed(tmp_path / "kept")
  change(copy / "report" / "page.py")
  assert embed(tmp_path / "kept")[1] == 0
  change(copy / "models" / "text_encoder.py")
  assert [embed(tmp_path / "kept")[1] for _ in range(2)] == [1, 0]
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "another")
  assert embed(tmp_path / "kept")[1] == 1


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_damaged_file_is_replaced(tmp_path, content):
  expected, _ = embed(tmp_path)
  (path,) = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:-4] if content is None else content)
  found, calls = embed(tmp_path)
  assert calls == 1
  np.testing.assert_array_equal(found, expected)
  assert embed(tmp_path)[1] == 0


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path):
  (tmp_path / "file").write_text("")
  assert embed(tmp_path / "file")[1] == 1


def test_what_was_not_used_for_longest_makes_room(tmp_path, monkeypatch):
  for place, weights in enumerate("ab"):
    embed(tmp_path, weights=weights)
    for path in tmp_path.iterdir():
      os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100 + place))
  assert embed(tmp_path, weights="a")[1] == 0
  monkeypatch.setattr(text_cache, "LIMIT", 2 * max(path.stat().st_size for path in tmp_path.iterdir()))
  embed(tmp_path, weights="c")
  assert [embed(tmp_path, weights=weights)[1] for weights in "ac"] == [0, 0]
  assert embed(tmp_path, weights="b")[1] == 1


def test_all_else_is_the_inferences_own(tmp_path):
  assert CachedTexts(Inference(), tmp_path, "w").max_length == 7
