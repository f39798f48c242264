"""What the tests keep of the compiler's work: whole entries, no more of them than LIMIT."""

from __future__ import annotations

import os
import pathlib

import pytest
from jax._src import compilation_cache

from tests import compiled


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return compiled.kept_folder()


def test_the_next_run_has_what_one_left_whole(tmp_path, cache):
  first, second = tmp_path / "first", tmp_path / "second"
  compiled.restore(first)
  assert not [*first.iterdir()]
  whole = compilation_cache.compress_executable(os.urandom(1000))
  (first / "a-cache").write_bytes(whole)
  (first / "b-cache").write_bytes(whole[:500])  # of a command that was killed
  (first / "c-cache").write_bytes(b"")
  (first / "seconds").mkdir()
  compiled.keep(first)
  assert [path.name for path in compiled.entries(cache)] == ["a-cache"]
  compiled.restore(second)
  assert [path.name for path in second.iterdir()] == ["a-cache"]
  assert (second / "a-cache").read_bytes() == whole


def test_what_was_not_used_for_longest_goes(tmp_path, cache, monkeypatch):
  run = tmp_path / "run"
  compiled.restore(run)
  for age, name in enumerate("abc"):
    entry = run / f"{name}-cache"
    entry.write_bytes(compilation_cache.compress_executable(os.urandom(1000)))
    os.utime(entry, (1e9 - age, 1e9 - age))
  monkeypatch.setattr(compiled, "is_whole", lambda entry: True)  # reading them is a use
  monkeypatch.setattr(compiled, "LIMIT", 2500)
  compiled.keep(run)
  assert sorted(path.name for path in compiled.entries(cache)) == ["a-cache", "b-cache"]
  assert len([*run.iterdir()]) == 3, "the run itself keeps all of them"
