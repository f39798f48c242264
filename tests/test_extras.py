"""Test that the extras that messages and pages name exist."""

from __future__ import annotations

import ast
import subprocess
import tomllib

import pytest

from diffdis_jax import errors
from diffdis_jax.run import writers
from tests.command_runs import ROOT

EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}
NAMED_LATER = {"writers.py": {*writers.TRACKERS}, "__main__.py": {"tpu", "cuda"}}


def test_every_extra_that_a_page_names_exists():
  listed = subprocess.run(
    ["git", "grep", "-hoIE", r"['\"]\.\[[a-z,_]+\]['\"]"], cwd=ROOT, capture_output=True, text=True
  )
  if listed.returncode:
    pytest.skip("no checkout of git")
  named = {extra for line in listed.stdout.split() for extra in line.strip("'\".[]").split(",")}
  assert named >= {"app", "torch", "tpu", "cuda", "tour", "wandb"} and named <= EXTRAS


def test_every_extra_that_a_message_names_exists():
  """An extra is the last argument of errors.not_installed, and the only one of errors.install."""
  named = set()
  for path in (ROOT / "diffdis_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("not_installed", "install"):
        if path.name == "errors.py":
          continue
        last = node.args[-1]
        extras = {last.value} if isinstance(last, ast.Constant) else NAMED_LATER[path.name]
        assert extras <= EXTRAS, f"{path}, line {node.lineno}: {extras}"
        named |= extras
  assert named >= {"app", "tpu", "cuda", "wandb"}


def test_the_message_names_the_package_and_the_command_to_type():
  error = errors.not_installed("the page", "gradio", "app")
  end = "pip install -e '.[app]' in the repository's folder"
  assert str(error) == f"the page needs gradio, which is not installed; {end}"
