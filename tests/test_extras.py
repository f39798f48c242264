"""Messages and pages name extras that there are, in a way that works: the project itself is on no package index."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import tomllib

from diffdis_jax import errors
from diffdis_jax.preflight import targets
from diffdis_jax.run import writers
from tests.command_runs import ROOT

EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}
NAMED_LATER = {"writers.py": {*writers.TRACKERS}, "targets.py": {*targets.PLATFORMS} - {"cpu"}}
NAMED_LATER["__main__.py"] = NAMED_LATER["targets.py"]


def texts() -> list[tuple[pathlib.Path, str]]:
  """Every file of the repository that is text, except for the change log."""
  listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
  found = []
  for name in listed.stdout.splitlines():
    path = ROOT / name
    if path.is_file() and path.suffix in {
      "",
      ".py",
      ".md",
      ".ipynb",
      ".sh",
      ".sbatch",
      ".yaml",
      ".yml",
      ".txt",
      ".toml",
    }:
      found.append((path, path.read_text(errors="replace")))
  assert len(found) > 300
  return found


def test_every_extra_that_is_named_exists():
  named = {(path.name, extra) for path, text in texts() for extra in re.findall(r"""['"]\.\[([\w,]+)\]""", text)}
  assert {extra for _, extra in named} >= {"app", "torch", "tpu", "cuda", "tour", "wandb"}
  assert {(name, extra) for name, extra in named if not {*extra.split(",")} <= EXTRAS} == set()


def test_every_extra_that_a_message_is_given_exists():
  """The last argument of errors.not_installed and the only one of errors.install."""
  found = set()
  for path in (ROOT / "diffdis_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("not_installed", "install"):
        if path.name == "errors.py":
          continue
        last = node.args[-1]
        extras = {last.value} if isinstance(last, ast.Constant) else NAMED_LATER[path.name]
        assert extras <= EXTRAS, f"{path}, line {node.lineno}: {extras}"
        found |= extras
  assert found >= {"app", "tpu", "cuda", "wandb", "trackio"}


def test_the_message_names_the_package_and_what_to_type():
  error = errors.not_installed("the page", "gradio", "app", otherwise="do without")
  end = "pip install -e '.[app]' in the repository's folder, or do without"
  assert str(error) == f"the page needs gradio, which is not installed; {end}"
