"""What README and the pages in docs/ tell the reader to type, in the environment that `make .venv/.installed` makes.

Every command is parsed there by its own flags. Those in RUN are run, those in RUN_SLOWLY by the slow tests; those in
NOT_RUN cannot be. A command that is in none of the three fails.
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

SOURCES = ("Makefile", "README.md", "LICENSE", "NOTICE", "requirements.txt", "pyproject.toml", "configs", "diffdis_jax")
UNREACHABLE = "error sending request|dns error|Failed to fetch|Could not connect"  # of uv, without a network

# Each entry is how a command begins. RUN: what is put behind it, and the files that it writes.
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
# In this order. Compiling for real sizes takes minutes; what is put behind makes them short.
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
  "python -m diffdis_jax.train --config=shapes_lt:stage=1": (SHORT, ()),
  "python -m diffdis_jax.train --config=shapes_lt:stage=2": (SHORT, ()),
  "python -m diffdis_jax.evaluate --workdir=runs/lt/stage2": ("", ("runs/lt/F.json", "runs/lt/F.md")),
}
NOT_RUN: dict[str, tuple[str, ...]] = {
  "is how the environment of these tests is made": ("make .venv/.installed",),
  "is these tests themselves, and needs their extras": (
    "make test",
    "make check",
    "make mutations",
    "make lint",
    "make docs",
    "make figures",
    "pytest",
    "python -m tests.test_configs",
  ),
  "trains for minutes to hours; tests/test_demo.py and tests/test_ablate.py run it with small networks": (
    "make demo",
    "make shapes",
    "python -m diffdis_jax.demo --out=runs/s1",
    "python -m diffdis_jax.ablate run --base=shapes --tables=2,3,4,5,7 --seeds=0,1,2",
    "python -m replication evaluate",
    "python -m replication.ablate run",
    "python -m replication.measure_emoji",
  ),
  "writes the records and the pages of this checkout, as tests/test_replication_page.py and test_measured.py check": (
    "python -m replication.measured.replication --tables=",
    "python -m replication.measured.tables",
  ),
  "times full-size networks or gigabytes of data": ("python -m diffdis_jax.benchmark",),
  "is the first two commands of docs/long_tail.md with other folders": (
    "python -m diffdis_jax.train --config=shapes:autoencoder --workdir=runs/shapes/autoencoder",
    "python -m diffdis_jax.train --config=shapes --workdir=runs/shapes/diffdis",
  ),
  "needs a cluster, a bucket or a compiler of another device": (
    "python -m diffdis_jax.ablate run ...",
    "python -m diffdis_jax.ablate plan --base=diffdis_cc3m",
    "python -m diffdis_jax.preflight",
    "python -m replication.scaling",
    "python -m diffdis_jax.train --config=diffdis_cc3m:path=gs://",
    "python -m diffdis_jax.train ...",
  ),
  "needs an extra": (
    "python -m diffdis_jax.app --workdir=shapes",
    "python -m diffdis_jax.train ... --tracker=wandb",
  ),
  "needs data or weights": (
    "make data/emoji/dataset_info.json",
    "python -m diffdis_jax.prepare_data",
    "python -m diffdis_jax.import_weights",
    "python -m diffdis_jax.train --config=diffdis_cc3m:path=DATA",
    "python -m diffdis_jax.train --config=own:path=",
    "python -m diffdis_jax.train --config=diffdis_cc3m:latents=LATENTS",
    "python -m diffdis_jax.train --config=diffdis_cc3m:runlocal,path=",
    "python -m diffdis_jax.train --config=places_lt",
    "python -m diffdis_jax.train --workdir=RUN --config=diffdis_cc3m",
    "python -m diffdis_jax.train --workdir=RUN --config=clip_cc3m",
    "python -m diffdis_jax.train --config=NAME --workdir=RUN --eval=",
    "python -m diffdis_jax.evaluate --workdir=RUN --tasks=zero_shot,retrieval --data=",
    "python -m diffdis_jax.evaluate --workdir=RUN --tasks=fid --data=",
    "python -m diffdis_jax.evaluate --workdir=RUN --tasks=median_rank --data=",
    "python -m diffdis_jax.evaluate --workdir=RUN --suite=",
    "python -m diffdis_jax.evaluate --workdir=STAGE2",
    "python -m diffdis_jax.evaluate --workdir=RUN --best",
    "python -m diffdis_jax.generate --workdir=SD",
    "python -m diffdis_jax.export_weights --workdir=RUN --push=",
  ),
  "is a pattern, of which the other commands are examples": (
    "python -m diffdis_jax.train --config=NAME[:args]",
    "python -m diffdis_jax.train ... --profile=100:5",
  ),
}
BEGINNINGS = (*RUN, *RUN_SLOWLY, *(line for lines in NOT_RUN.values() for line in lines))

COMMANDS = [*pages.commands()]
# Each as python -m, which `diffdis COMMAND` is another way to write, and with its config by name.
LINES = [*dict.fromkeys(pages.as_module(command.line.removeprefix(".venv/bin/")) for command in COMMANDS)]
# What stands for something else: in the place of `...` what is required.
MEANT = {
  "--config=NAME": "--config=shapes",
  # Which needs data at once, to count them.
  "--config=own:path=DATA,from=SD,memory=24": "--config=shapes",
  "--config=own:path=data/own": "--config=shapes",
  "--config=own:path=DATA": "--config=shapes",
  "steps=N": "steps=2",
  "train ...": "train --config=shapes --workdir=RUN",
  "ablate run ...": "ablate run --base=shapes --tables=4",
}


def beginnings_of(line: str) -> list[str]:
  """The longest entry of the tables with which this line begins, if there is one."""
  return sorted((each for each in BEGINNINGS if line.startswith(each)), key=len)[-1:]


def test_every_command_of_a_page_is_run_or_has_a_reason_why_not():
  assert len(LINES) > 40 and len({*BEGINNINGS}) == len(BEGINNINGS)
  assert [line for line in LINES if not beginnings_of(line)] == []
  assert {*BEGINNINGS} - {each for line in LINES for each in beginnings_of(line)} == set(), "no page has these any more"
  # Such a run freezes what nothing else gives it, and is refused.
  of_cc3m = [line for line in LINES if ".train " in line and re.search(r"--config=diffdis_cc3m:(?!runlocal)", line)]
  assert len(of_cc3m) > 3 and [line for line in of_cc3m if "--config.init_from=" not in line] == []


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A copy of the sources with `.venv`, made by the Makefile's own rule; uv does pip's part, in a third of the time."""

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
  """The variables of a shell in that copy in which its environment is active."""
  known = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
  return known | {"PATH": f"{plain}/.venv/bin:{known['PATH']}", "VIRTUAL_ENV": f"{plain}/.venv"}


def run(command: list[str], folder: pathlib.Path, environment: dict[str, str], **options: Any) -> str:
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, **options)
  assert done.returncode == 0, f"{command}: {done.stderr}"
  return done.stdout


def test_the_environment_has_the_package_with_its_version_and_none_of_the_extras(plain, typed, tmp_path):
  version = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]["version"]
  script = "import importlib.util as u, diffdis_jax as d; print(d.__version__, d.__file__, *map(u.find_spec, {}))"
  extras = ["torch", "pytest", "gradio", "matplotlib", "huggingface_hub.none"]
  said = run([f"{plain}/.venv/bin/python", "-c", script.format(extras[:-1])], tmp_path, typed).split()
  assert said == [version, str(plain / "diffdis_jax" / "__init__.py"), *["None"] * 4]


@pytest.fixture(scope="module")
def folder(plain: pathlib.Path, exportable_run: str) -> pathlib.Path:
  """The copy, with a small run where the pages have theirs, and two files of results."""
  for name in ("RUN", "runs/demo/diffdis"):
    shutil.copytree(exportable_run, plain / name)
  for name in ("diffdis", "clip"):
    words = dict(dataset="test", model="m", pretrained=name, task="zeroshot_classification")
    record = results.make_record(**words, metrics={"acc1": 0.5}, protocol={"num_images": 4}, provenance={})
    (plain / f"{name}.json").write_text(json.dumps({"zero_shot": {"test": record}}))
  return plain


def test_every_command_shows_its_help_and_takes_what_the_pages_give_it(folder, typed):
  lines = []
  for line in LINES:
    if line.startswith("python -m diffdis_jax."):
      for word, meant in MEANT.items():
        line = line.replace(word, meant)
      line = re.sub(r"init=[\w/]+", "init=RUN", re.sub(r"\[[^\]]*\]", "", line))
      lines.append(shlex.split(line.removeprefix("python -m diffdis_jax.")))
  helps = [[name, "--help"] for name in main_module.commands()]
  script = (pages.ROOT / "tests" / "parse_commands.py").read_text()
  said = json.loads(
    run([f"{folder}/.venv/bin/python", "-c", script], folder, typed, input=json.dumps([*helps, *lines]))
  )
  for (name, _), (code, shown) in zip(helps, said):
    assert code == 0 and f"diffdis {name}" in shown and "--[no]quiet" in shown, shown
  refused = [(words, text) for words, (code, text) in zip(lines, said[len(helps) :], strict=True) if code]
  assert refused == []
  assert len(lines) > 40 and len(helps) >= 12


def run_as_typed(beginning: str, behind: str, files: tuple[str, ...], folder: pathlib.Path, typed: dict[str, str]):
  """The first command of the pages that begins so."""
  line = next(line for line in LINES if beginnings_of(line) == [beginning])
  line = re.sub(r"\[[^\]]*\]", "", line.replace("steps=N", MEANT["steps=N"]))
  said = run(["bash", "-c", f"{line} {behind}"], folder, typed)
  for name in files:
    assert (folder / name).stat().st_size, f"{line} wrote no {name}"
  return said


@pytest.mark.parametrize("beginning", RUN)
def test_a_command_runs(folder, typed, beginning):
  behind, files = RUN[beginning]
  said = run_as_typed(beginning, behind, files, folder, typed)
  if "ablate plan" in beginning:
    assert ("50 runs" if "replication" in beginning else "28 runs") + ", 0 finished" in said
  for name in files:
    if name.endswith(".png"):
      Image.open(folder / name).load()


def test_every_block_of_python_is_run_by_a_test():
  """Below, in test_export_weights.py and in test_extending.py."""
  run_by_a_test = {"README.md": 1, "docs/quickstart.md": 1, "docs/api.md": 1}
  run_by_a_test |= {"docs/weights.md": 1, "docs/extending.md": 4}
  assert {page: number for page in pages.PAGES if (number := pages.number_of_python_blocks(page))} == run_by_a_test


def test_the_blocks_of_python_run(folder, typed):
  """README's, the quickstart's and the reference's, with a run where `make demo` leaves it."""
  readme = pages.python_block("README.md", "model.generate")
  quickstart = pages.python_block("docs/quickstart.md", "model.generate")
  reference = pages.python_block("docs/api.md", "diffdis_jax.load")
  script = f"{readme}\n{quickstart}\n{reference}"
  said = run([f"{folder}/.venv/bin/python", "-c", script], folder, typed)
  assert re.fullmatch(r"(\['(red star|blue ring)', '(red star|blue ring)'\]\n){2}", said)


@pytest.mark.full
def test_the_long_commands_run_one_after_the_other(folder, typed):
  for beginning, (behind, files) in RUN_SLOWLY.items():
    if beginning == README_TRAINS:
      shutil.rmtree(folder / "RUN")
    run_as_typed(beginning, behind, files, folder, typed)
  run_as_typed(README_TRAINS, "", (), folder, typed)  # again: it resumes at its end
  starts = [event["step"] for event in provenance.read(str(folder / "RUN")) if event["event"] == "start"]
  assert starts == [0, 20]
