"""requirements.txt resolves on every Python and machine that it says, to wheels alone."""

from __future__ import annotations

import concurrent.futures
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LINUX = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")
MACHINES = [(python, machine) for python in ("3.11", "3.12", "3.13", "3.14") for machine in LINUX]


def resolve(machine: tuple[str, str]) -> dict[str, str] | str:
  """Package -> version, or why it cannot be done."""
  python, platform = machine
  command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
  # promise, which tensorflow-datasets needs, has no wheel anywhere and is pure Python.
  command += ["--only-binary=:all:", "--no-binary=promise", f"--python-version={python}"]
  command += [f"--python-platform={platform}", "requirements.txt"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  return dict(re.findall(r"^([\w.\-]+)==(\S+)$", done.stdout, re.M)) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def resolved() -> dict[tuple[str, str], dict[str, str]]:
  with concurrent.futures.ThreadPoolExecutor(len(MACHINES)) as pool:
    found = dict(zip(MACHINES, pool.map(resolve, MACHINES), strict=True))
  errors = [each for each in found.values() if isinstance(each, str)]
  if any(re.search("error sending request|dns error|Failed to fetch|Could not connect", each) for each in errors):
    pytest.skip("no package index can be reached")
  assert not errors, errors[0]
  return found


@pytest.mark.parametrize("machine", MACHINES, ids="-".join)
def test_a_fresh_machine_resolves(resolved, machine):
  found = resolved[machine]
  numbers = lambda name: tuple(map(int, re.findall(r"\d+", found[name])[:2]))
  assert (0, 10) <= numbers("jax") < (0, 13) and numbers("array-record") >= (0, 8)
  assert {"flax", "optax", "orbax-checkpoint", "transformers", "grain", "clu", "ml-collections"} <= found.keys()
  assert not [name for name in found if name in ("tensorflow", "tensorflow-cpu", "torch")]
