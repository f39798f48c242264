"""Test the commands of README and docs/ in an environment that `make .venv/.installed` has made.

The flags of every command are parsed. The commands of RUN are run, and those of RUN_SLOWLY with the mark `full`.
"""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from PIL import Image

from diffdis_jax import __main__ as main_module
from diffdis_jax.evals import results
from diffdis_jax.run import provenance
from tests import pages
from tests.once import made_once

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)

SOURCES = (
  "Makefile",
  "README.md",
  "LICENSE",
  "NOTICE",
  "requirements.txt",
  "pyproject.toml",
  "configs",
  "diffdis_jax",
  "replication",
)
UNREACHABLE = "error sending request|dns error|Failed to fetch|Could not connect"  # uv's errors without a network

# Each entry maps the beginning of a command to what the tests append, and the files that the command writes.
RUN: dict[str, tuple[str, tuple[str, ...]]] = {
  "python -m diffdis_jax.report --workdir=RUN": ("", ("report.html",)),
  "python -m diffdis_jax.evaluate --compare=": ("", ("table.md",)),
  "python -m diffdis_jax.config show": ("", ()),
  "python -m diffdis_jax.verify --workdir=RUN": ("", ()),
  "python -m diffdis_jax.status RUN": ("", ()),
  "python -m diffdis_jax.ablate plan --base=shapes": ("", ()),
  "python -m diffdis_jax.ablate table --base=shapes --tables=2,3,4,5,7 --seeds=0,1,2": (
    "",
    ("runs/ablations/tables.json", "runs/ablations/tables.md"),
  ),
  "python -m diffdis_jax.export_weights --workdir=RUN --out=DIR": ("", ("DIR/unet/config.json", "DIR/README.md")),
  "python -m diffdis_jax.generate --workdir=RUN": ("", ("images/00000.png", "images/00007.png", "images/grid.png")),
  "python -m diffdis_jax.generate --workdir=shapes": ("", ("pictures/00000.png", "pictures/grid.png")),
  "python -m diffdis_jax.generate --workdir=runs/demo/diffdis": ("", ("more/00001.png", "more/grid.png")),
  "python -m diffdis_jax.export_weights --workdir=runs/demo/diffdis": ("", ("exported/unet/config.json",)),
}
# These are run in this order. SHORT makes them short.
SHORT = "--config.num_steps=2 --config.log_every=1"
README_TRAINS = "python -m diffdis_jax.train --config=diffdis_cc3m:runlocal --workdir=RUN"
RUN_SLOWLY: dict[str, tuple[str, tuple[str, ...]]] = {
  "python -m diffdis_jax.evaluate --workdir=RUN --tasks=zero_shot,retrieval --out=": ("", ("emoji.json",)),
  "python -m diffdis_jax.evaluate --workdir=runs/demo/diffdis --tasks=zero_shot": ("", ("F.json",)),
  "python -m diffdis_jax.evaluate --workdir=shapes --tasks=zero_shot": ("--out=S.json", ("S.json",)),
  "python -m diffdis_jax.evaluate --workdir=RUN --tasks=generation_accuracy --out=": ("--out=G.json", ("G.json",)),
  README_TRAINS: ("", ("RUN/samples/samples_00000020.png", "RUN/checkpoints/20/commit_success.txt")),
  "python -m diffdis_jax.train --config=shapes:autoencoder --workdir=runs/lt/autoencoder": (SHORT, ()),
  "python -m diffdis_jax.train --config=shapes --workdir=runs/lt/diffdis": (SHORT, ()),
  "python -m replication train --config=replication/configs/shapes_lt.py:stage=1": (SHORT, ()),
  "python -m replication train --config=replication/configs/shapes_lt.py:stage=2": (SHORT, ()),
  "python -m replication evaluate --workdir=runs/lt/stage2": ("", ("runs/lt/F.json", "runs/lt/F.md")),
}
# Every command of the pages, written as python -m and with its config's name.
LINES = [*dict.fromkeys(pages.as_module(line.removeprefix(".venv/bin/")) for line in pages.commands())]
# Placeholders of the pages -> what a reader would type in their place.
MEANT = {
  "--config=NAME": "--config=shapes",
  # The config `own` reads its data when it is loaded, in order to count them.
  "--config=own:path=DATA,from=SD,memory=24": "--config=shapes",
  "--config=own:path=data/own": "--config=shapes",
  "--config=own:path=DATA": "--config=shapes",
  "steps=N": "steps=2",
  "train ...": "train --config=shapes --workdir=RUN",
  "ablate run ...": "ablate run --base=shapes --tables=4",
}


def test_a_run_of_diffdis_cc3m_on_a_page_says_what_it_starts_from():
  """Without a start, such a run would freeze random parameters, and is refused."""
  lines = [line for line in LINES if ".train " in line and re.search(r"--config=diffdis_cc3m:(?!runlocal)", line)]
  assert len(lines) > 3 and [line for line in lines if "--config.init_from=" not in line] == []


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Copy the sources and make `.venv` by the Makefile. uv in the place of pip takes a third of the time."""

  def make(folder: pathlib.Path) -> None:
    folder.mkdir()
    for name in SOURCES:
      copy = shutil.copytree if (pages.ROOT / name).is_dir() else shutil.copy
      copy(pages.ROOT / name, folder / name)
    pip = f"PIP={sys.executable} -m uv pip install --quiet --python .venv/bin/python"
    command = ["make", f"PYTHON={sys.executable}", pip, ".venv/.installed"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if re.search(UNREACHABLE, done.stderr):
      pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr

  return made_once(tmp_path_factory, "plain", make)


@pytest.fixture(scope="session")
def typed(plain: pathlib.Path, environment: dict[str, str]) -> dict[str, str]:
  """Return the variables of a shell in which the environment of the copy is active."""
  known = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
  return known | {"PATH": f"{plain}/.venv/bin:{known['PATH']}", "VIRTUAL_ENV": f"{plain}/.venv"}


def run(command: list[str], folder: pathlib.Path, environment: dict[str, str], **options: Any) -> str:
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, **options)
  assert done.returncode == 0, f"{command}: {done.stderr}"
  return done.stdout


def test_the_environment_has_the_package_with_its_version_and_none_of_the_extras(plain, typed, tmp_path):
  version = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]["version"]
  script = "import importlib.util as u, diffdis_jax as d; print(d.__version__, d.__file__, *map(u.find_spec, {}))"
  extras = ["torch", "pytest", "gradio", "matplotlib"]
  printed = run([f"{plain}/.venv/bin/python", "-c", script.format(extras)], tmp_path, typed).split()
  assert printed == [version, str(plain / "diffdis_jax" / "__init__.py"), *["None"] * 4]


@pytest.fixture(scope="module")
def folder(plain: pathlib.Path, exportable_run: str) -> pathlib.Path:
  """Put a small run, under the names that the pages use, and two files of results into the copy."""
  for name in ("RUN", "runs/demo/diffdis"):
    shutil.copytree(exportable_run, plain / name)
  for name in ("diffdis", "clip"):
    words = dict(dataset="test", model="m", pretrained=name, task="zeroshot_classification")
    record = results.make_record(**words, metrics={"acc1": 0.5}, protocol={"num_images": 4}, provenance={})
    (plain / f"{name}.json").write_text(json.dumps({"zero_shot": {"test": record}}))
  return plain


def test_every_command_shows_its_help_and_takes_the_flags_of_the_pages(folder, typed):
  lines = []
  for line in LINES:
    if line.startswith("python -m diffdis_jax."):
      for word, replacement in MEANT.items():
        line = line.replace(word, replacement)
      line = re.sub(r"init=[\w/]+", "init=RUN", re.sub(r"\[[^\]]*\]", "", line))
      lines.append(shlex.split(line.removeprefix("python -m diffdis_jax.")))
  helps = [[name, "--help"] for name in main_module.commands()]
  script = (pages.ROOT / "tests" / "parse_commands.py").read_text()
  python = f"{folder}/.venv/bin/python"
  outcomes = json.loads(run([python, "-c", script], folder, typed, input=json.dumps([*helps, *lines])))
  for (name, _), (code, printed) in zip(helps, outcomes):
    assert code == 0 and f"diffdis {name}" in printed and "--[no]quiet" in printed, printed
  refused = [(words, text) for words, (code, text) in zip(lines, outcomes[len(helps) :], strict=True) if code]
  assert refused == []
  assert len(lines) > 40 and len(helps) >= 12


def run_as_typed(beginning: str, appended: str, files: tuple[str, ...], folder: pathlib.Path, typed: dict[str, str]):
  """Run the first command of the pages with this beginning, and return its output."""
  line = next(line for line in LINES if line.startswith(beginning))
  line = re.sub(r"\[[^\]]*\]", "", line.replace("steps=N", MEANT["steps=N"]))
  printed = run(["bash", "-c", f"{line} {appended}"], folder, typed)
  for name in files:
    assert (folder / name).stat().st_size, f"{line} wrote no {name}"
  return printed


@pytest.mark.parametrize("beginning", RUN)
def test_a_command_runs(folder, typed, beginning):
  appended, files = RUN[beginning]
  printed = run_as_typed(beginning, appended, files, folder, typed)
  assert "ablate plan" not in beginning or "28 runs, 0 finished" in printed
  for name in files:
    if name.endswith(".png"):
      Image.open(folder / name).load()


def test_every_block_of_python_is_run_by_a_test():
  """The tests that run them are below, in test_export_weights.py and in test_extending.py."""
  run_by_a_test = {"README.md": 1, "docs/quickstart.md": 1, "docs/api.md": 1}
  run_by_a_test |= {"docs/weights.md": 1, "docs/extending.md": 4}
  assert {page: number for page in pages.PAGES if (number := pages.number_of_python_blocks(page))} == run_by_a_test


def test_the_blocks_of_python_run(folder, typed):
  """Run the blocks of README, the quickstart and the reference on a run in the folder of `make demo`."""
  readme = pages.python_block("README.md", "model.generate")
  quickstart = pages.python_block("docs/quickstart.md", "model.generate")
  reference = pages.python_block("docs/api.md", "diffdis_jax.load")
  script = f"{readme}\n{quickstart}\n{reference}"
  printed = run([f"{folder}/.venv/bin/python", "-c", script], folder, typed)
  assert re.fullmatch(r"(\['(red star|blue ring)', '(red star|blue ring)'\]\n){2}", printed)


@pytest.mark.full
def test_the_long_commands_run_one_after_the_other(folder, typed):
  for beginning, (appended, files) in RUN_SLOWLY.items():
    if beginning == README_TRAINS:
      shutil.rmtree(folder / "RUN")
    run_as_typed(beginning, appended, files, folder, typed)
  run_as_typed(README_TRAINS, "", (), folder, typed)  # again: it resumes at its end
  starts = [event["step"] for event in provenance.read(str(folder / "RUN")) if event["event"] == "start"]
  assert starts == [0, 20]
