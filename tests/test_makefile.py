"""The Makefile's own rules, with stand-ins for Python and npm. That they install and train is in test_pages.py."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.command_runs import ROOT

OF_TODAY = ".".join(map(str, sys.version_info[:3]))
# What `make` takes for Python: of a given version, as `-c` sees it. `-m venv` puts it where a new environment has its
# own, and leaves one that is there, as venv does; all other modules do nothing.
PYTHON = f"""#!/bin/sh
case $1 in
  -c) exec {sys.executable} -c 'import sys
sys.version = "VERSION (main)"
sys.version_info = tuple(map(int, "VERSION".split(".")))
exec(sys.argv[1])' "$2" ;;
  -m) [ "$2" != venv ] || {{ mkdir -p "$3/bin"; [ -e "$3/bin/python" ] || cp "$0" "$3/bin/python"; }} ;;
esac
"""
NPM = """#!/bin/sh
printf '%s\\n' "$@" >npm_was_given
"""


def put(folder: pathlib.Path, name: str, text: str) -> str:
  file = folder / name
  file.write_text(text)
  file.chmod(0o755)
  return str(file)


@pytest.fixture
def clone(tmp_path: pathlib.Path) -> pathlib.Path:
  """With a blank in its path."""
  folder = tmp_path / "my clone"
  folder.mkdir()
  for name in ("Makefile", "requirements.txt", "pyproject.toml"):
    shutil.copy(ROOT / name, folder / name)
  return folder


def make(clone: pathlib.Path, *words: str, path: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
  # Not that of the make that runs the tests, whose flags and variables it would take.
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
  environment |= {"PATH": f"{path}:{environment['PATH']}"} if path else {}
  return subprocess.run(["make", *words], cwd=clone, env=environment, capture_output=True, text=True)


def test_a_python_that_is_too_old_is_named_and_hinders_no_other(clone, tmp_path):
  old = put(tmp_path, "python3.10", PYTHON.replace("VERSION", "3.10.12"))
  new = put(tmp_path, "python3.x", PYTHON.replace("VERSION", OF_TODAY))
  done = make(clone, f"PYTHON={old}", ".venv/.installed")
  assert done.returncode and not (clone / ".venv").exists()
  assert done.stderr.startswith(
    "Python 3.10.12 is too old; give one of 3.11 or later, such as: make PYTHON=python3.12 .venv/.installed\n"
  )
  done = make(clone, f"PYTHON={new}", ".venv/.installed")
  assert done.returncode == 0 and (clone / ".venv" / ".installed").exists(), done.stderr
  said = subprocess.run([clone / ".venv/bin/python", "-c", "print(sys.version)"], capture_output=True, text=True)
  assert said.stdout.startswith(OF_TODAY)


def test_an_environment_of_a_python_that_is_too_old_is_named_and_stays(clone, tmp_path):
  new = put(tmp_path, "python3.x", PYTHON.replace("VERSION", OF_TODAY))
  (clone / ".venv" / "bin").mkdir(parents=True)
  put(clone / ".venv" / "bin", "python", PYTHON.replace("VERSION", "3.10.12"))
  done = make(clone, f"PYTHON={new}", ".venv/.installed")
  assert done.returncode and (clone / ".venv" / "bin" / "python").exists()
  assert "Python 3.10.12 is too old" in done.stderr
  assert ".venv has that Python: remove the folder first\n" in done.stderr


def test_the_emoji_come_into_a_clone_with_a_blank_in_its_path(clone, tmp_path):
  python = PYTHON.replace("VERSION", OF_TODAY).replace("exec(sys.argv[1])", 'print("emojibase@1 noto@2")')
  (clone / ".venv" / "bin").mkdir(parents=True)
  put(clone / ".venv" / "bin", "python", python)
  (clone / ".venv" / ".installed").touch()
  put(tmp_path, "npm", NPM)
  done = make(clone, "data/emoji/dataset_info.json", path=tmp_path)
  assert done.returncode == 0, done.stderr
  given = (clone / "runs/emoji/icons/npm_was_given").read_text().split()
  assert given == ["pack", "--silent", "emojibase@1", "noto@2"]
