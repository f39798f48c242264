"""jax's cache of compiled programs, whose entries are whole or absent."""

from __future__ import annotations

import os
import pathlib

import jax
import pytest
from jax._src.lru_cache import LRUCache

from diffdis_jax.common import cli, repairs


def test_an_entry_of_the_compilation_cache_is_whole_or_absent(tmp_path, monkeypatch):
  repairs.repair_compilation_cache()
  cache, parts = LRUCache(str(tmp_path), max_size=-1), []

  def killed(part: os.PathLike[str], entry: os.PathLike[str]) -> None:
    assert pathlib.Path(part).read_bytes() == b"program" and not pathlib.Path(entry).exists()
    parts.append(pathlib.Path(part))
    raise OSError("no space")

  with monkeypatch.context() as patched:
    patched.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="no space"):
      cache.put("key", b"program")
  assert cache.get("key") is None and not [*tmp_path.iterdir()]
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  (tmp_path / "programs").mkdir()
  for folder in (tmp_path, tmp_path / "programs"):
    (folder / parts[0].name).touch()  # as where the process was killed
  cli.compilation_cache()
  (tmp_path / "programs").rmdir()
  assert not [*tmp_path.iterdir()]
  for value in (b"program", b"another"):
    cache.put("key", value)
    assert cache.get("key") == b"program" and len([*tmp_path.iterdir()]) == 1


def test_a_cache_with_a_limit_is_written_as_jax_does_it(tmp_path):
  repairs.repair_compilation_cache()
  cache = LRUCache(str(tmp_path), max_size=10)
  cache.put("a", b"12345678")
  cache.put("b", b"12345678")
  assert cache.get("a") is None and cache.get("b") == b"12345678"
