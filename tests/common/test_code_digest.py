"""A hash of code: the same for the same files and versions, another for any other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import pytest

from diffdis_jax.common import code_digest
from tests.changed_code import change, copy_package


def test_a_copy_of_the_package_has_the_same_hash(tmp_path, monkeypatch):
  names = ("models", "inference.py", "data/clip_merges.txt.gz")
  here = [code_digest.of(*names), code_digest.of(".")]
  copy_package(tmp_path, monkeypatch)
  assert [code_digest.of(*names), code_digest.of(".")] == here and here[0] != here[1]


def test_each_file_counts_and_its_name(tmp_path, monkeypatch):
  copy = copy_package(tmp_path, monkeypatch)
  models, tokens = lambda: code_digest.of("models"), lambda: code_digest.of("data/clip_merges.txt.gz")
  first = models(), tokens(), code_digest.of(".")
  change(copy / "report" / "page.py")
  assert (models(), tokens()) == first[:2] and code_digest.of(".") != first[2]
  change(copy / "models" / "clip.py")
  second = models()
  assert second != first[0]
  (copy / "models" / "clip.py").rename(copy / "models" / "klip.py")
  assert models() not in (first[0], second)
  change(copy / "data" / "clip_merges.txt.gz")
  assert tokens() != first[1]


def test_code_that_is_edited_while_a_process_runs_counts_from_the_next_one_on(tmp_path, monkeypatch):
  """What that process makes is kept for the code that it runs. Emacs's mark of an edited file leads nowhere."""
  copy = copy_package(tmp_path, monkeypatch)
  (copy / "models" / ".#clip.py").symlink_to("me@host.1:2")

  def start() -> Callable[..., str]:
    spec = importlib.util.spec_from_file_location("started", copy / "common" / "code_digest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.of

  running, before = start(), code_digest.of(".")
  change(copy / "models" / "clip.py")
  assert running(".") == before != start()(".")


def test_versions_count_and_so_does_that_a_package_is_missing(monkeypatch):
  def found(**versions: str) -> str:
    def version(name: str) -> str:
      if name not in versions:
        raise importlib.metadata.PackageNotFoundError(name)
      return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return code_digest.of("errors.py", packages=("jax", "ftfy"))

  digests = [found(jax="0.10.2"), found(jax="0.10.3"), found(jax="0.10.2", ftfy="6"), found(ftfy="6")]
  assert len({*digests}) == 4
  assert found(jax="0.10.2") == digests[0]


def test_a_file_that_is_not_there_is_no_hash():
  with pytest.raises(FileNotFoundError):
    code_digest.of("models/none.py")
