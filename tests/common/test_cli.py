"""Test command lines as a user types them, with a command that does nothing."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import diffdis_jax
from diffdis_jax import __main__ as main_module
from diffdis_jax.common import cli
from tests import command_runs

ROOT = pathlib.Path(__file__).parents[2]

VERB = """
import sys
from absl import flags
from diffdis_jax.common import cli
from diffdis_jax.errors import UserError

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
STEPS = flags.DEFINE_integer("steps", 3, "sampling steps")
FAIL = flags.DEFINE_enum("fail", None, ["user", "bug", "folder", "full", "net", "server", "right"], "how to fail")


def main(_):
  cli.compilation_cache()
  import jax
  from orbax import checkpoint

  if FAIL.value == "user":
    raise UserError("first line\\n  second line")
  if FAIL.value == "folder":
    open(".")
  if FAIL.value == "full":
    raise OSError(28, "No space left on device", "run/file")
  if FAIL.value == "net":
    raise ConnectionRefusedError(111, "Connection refused")
  if FAIL.value == "server":
    raise OSError("Forbidden: b/run\\nsomeone does not have storage.objects.get access")
  if FAIL.value == "right":
    raise PermissionError(13, "Permission denied")
  if FAIL.value == "bug":
    raise RuntimeError("a bug")
  checkpoint.CheckpointManager(WORKDIR.value)
  sys.stdout.write(f"{jax.config.jax_compilation_cache_dir} {CONFIG.value.to_json()}")


if __name__ == "__main__":
  cli.run(main)
"""

CONFIG = """
from ml_collections import ConfigDict, config_dict
from configs import common

def get_config(arg=None):
  arg = common.parse_arg(arg, gamma=1.0, runlocal=False)
  return ConfigDict(dict(
    seed=0, gamma=arg.gamma, optim=dict(rate=1e-3, betas=(0.9, 0.99)), init_from=config_dict.placeholder(str)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("cli")
  (path / "verb.py").write_text(VERB)
  (path / "tiny.py").write_text(CONFIG)
  return path


def start(folder, *flags: str, **environment: str) -> subprocess.Popen[str]:
  env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TF_"))}
  env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
  command = [sys.executable, str(folder / "verb.py"), *flags]
  return command_runs.start(command, env, folder=folder)


def run(folder, *flags: str, **environment: str) -> tuple[int, str, str]:
  process = start(folder, *flags, **environment)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_a_good_command_line_is_quiet_and_has_its_overrides(folder):
  flags = ["--config=tiny.py:runlocal,gamma=2", "--workdir=good"]
  overrides = ["--config.optim.rate=1", "--config.optim.betas=(0, 1)", "--config.init_from=X"]
  code, out, err = run(folder, *flags, *overrides, XDG_CACHE_HOME=str(folder / "home"), JAX_COMPILATION_CACHE_DIR="")
  assert (code, err) == (0, "")
  cache, _, config = out.partition(" ")
  assert cache == f"{folder}/home/diffdis_jax/jax"
  assert json.loads(config) == {"gamma": 2.0, "init_from": "X", "optim": {"betas": [0, 1], "rate": 1.0}, "seed": 0}


GOOD = ("--config=tiny.py", "--workdir=run")


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags, message",
  [
    (GOOD + ("--config.optim.rat=1",), "unknown config key optim.rat; did you mean optim.rate?"),
    (GOOD + ("--rate=1",), "unknown flag --rate; did you mean --config.optim.rate?"),
    (GOOD + ("--config.zzzz=1",), "unknown config key zzzz; known: gamma, init_from, optim.betas, optim.rate, seed"),
    (GOOD + ("--config.seed=abc",), "flag --config.seed=abc: invalid literal for int()"),
    (GOOD + ("--steps=many",), "flag --steps=many: invalid literal for int()"),
    (GOOD + ("--fail=right",), "error: cannot use a file: Permission denied"),
    (GOOD[:1] + ("--workdir=s3://b/run",), "s3://b/run is no address that can be read; give a local path or gs://"),
    (GOOD + ("extra",), "unexpected argument 'extra'; every argument is a flag, --name=value"),
    (GOOD[:1], "error: --workdir (folder of the run) is missing\n"),
    ((), "or FILE.py[:args]) and --workdir (folder of the run) are missing\n"),
    (GOOD[:1] + ("--workdir=",), "error: --workdir= is empty; give a path\n"),
    (("--config=tny.py", "--workdir=run"), "no config tny.py; did you mean tiny.py?"),
    (("--config=tiny.py:gama=1", "--workdir=run"), "unknown argument 'gama'; known: gamma, runlocal"),
    (("--config=wrong.py", "--workdir=run"), "--config=wrong.py: NameError: name 'nothing' is not defined (line 2)"),
    (GOOD + ("--fail=user",), "first line second line"),
  ],
)
def test_bad_input_is_one_line(folder, flags, message):
  (folder / "wrong.py").write_text("def get_config():\n  return nothing\n")
  code, out, err = run(folder, *flags)
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
  assert message in err
  assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, message, lines",
  [
    ("full", "error: No space left on device (run/file); make room, and run the same command again\n", 1),
    ("net", "Connection refused", 1),
    ("server", "Forbidden: b/run someone does not", 1),
    ("bug", "RuntimeError: a bug", None),
  ],
)
def test_what_may_pass_is_one_line_and_a_bug_keeps_its_traceback(folder, kind, message, lines):
  code, out, err = run(folder, *GOOD, f"--fail={kind}")
  assert (code, out) == (1, "") and message in err  # a launcher would retry after code 1
  assert err.count("\n") == lines if lines else "Traceback" in err


COMMANDS = [*main_module.commands()]
FLAG = re.compile(r"^  --(?:\[no\])?(\w+):", re.MULTILINE)


@functools.cache
def answers_to(*lines: tuple[str, ...]) -> list[tuple[int, str]]:
  """Parse the flags of these commands in one process; return each exit code and output."""
  command = [sys.executable, str(ROOT / "tests" / "parse_commands.py")]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, env=env, text=True, capture_output=True, input=json.dumps(lines), check=True)
  return [(code, text) for code, text in json.loads(done.stdout)]


def helps() -> dict[str, str]:
  answers = answers_to(*[(command, "--help") for command in COMMANDS])
  assert [code for code, _ in answers] == [0] * len(COMMANDS)
  return {command: text for command, (_, text) in zip(COMMANDS, answers, strict=True)}


@pytest.mark.slow
def test_every_help_begins_with_its_command_and_an_example_whose_flags_exist():
  for command, help_text in helps().items():
    assert " ".join(help_text.split()).startswith(main_module.commands()[command]), help_text
    assert f"diffdis {command} " in help_text
    names = set(FLAG.findall(help_text.partition("\nFlags:\n")[2]))
    lines = re.findall(rf"diffdis {command} .*", help_text.replace("\\\n", " "))
    used = {name.removeprefix("no") for name in re.findall(r"--(\w+)", " ".join(lines))}
    assert used and used <= names, f"{command}: {used - names}"
    assert "quiet" in names and not names & {"alsologtostderr", "verbosity", "tfds_dir"}


@pytest.mark.slow
def test_the_version_and_the_list_of_commands(capsys):
  expected = f"diffdis_jax {diffdis_jax.__version__}\n"
  assert answers_to(*[(command, "--version") for command in COMMANDS]) == [(0, expected)] * len(COMMANDS)
  assert main_module.main(["--version"]) == 0
  assert capsys.readouterr().out == expected
  assert main_module.main([]) == 0
  listed = capsys.readouterr().out
  assert all(f"  {command} " in listed and purpose in listed for command, purpose in main_module.commands().items())


def test_a_command_that_does_not_exist_is_one_line(capsys):
  assert main_module.main(["evalute"]) == 2
  assert capsys.readouterr().err == "error: no command 'evalute'; did you mean evaluate?\n"
  assert main_module.main(["xyz"]) == 2
  assert capsys.readouterr().err.startswith("error: no command 'xyz'; known: ablate, app, ")


@pytest.mark.parametrize("command", [["config", "--help"], ["config", "show", "shapes"]])
def test_a_closed_output_is_no_error(command):
  """`diffdis ... | head` ends when head has read enough."""
  line = shlex.join([sys.executable, "-m", "diffdis_jax", *command])
  # The code of the command, not of the reader.
  done = subprocess.run(
    ["bash", "-c", f"{line} | true; echo ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.stdout, done.stderr) == ("0\n", "")


OWN = """from __future__ import annotations
import dataclasses
import mysizes
from diffdis_jax.configs import common, shapes

@dataclasses.dataclass
class Size:
  batch: int = mysizes.BATCH

def get_config():
  config = shapes.get_config()
  config.batch_size = Size().batch
  return config
"""


def show(folder: pathlib.Path, name: str, program=("-m", "diffdis_jax")) -> str:
  """Return the output of `config show` in another folder."""
  command = [sys.executable, *program, "config", "show", name, "--fields=batch_size"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


def test_a_config_is_found_by_its_name_in_another_folder(tmp_path):
  assert {*cli.config_names()} == {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
  (tmp_path / "shapes").mkdir()  # perhaps the folder of a run
  (tmp_path / "configs").mkdir()  # the folder of another project
  (tmp_path / "configs/common.py").write_text("raise AssertionError")
  assert "batch_size = 48" in show(tmp_path, "shapes")


def test_ones_own_file_finds_the_packages_modules_and_ones_own(tmp_path):
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin/diffdis").write_text("from diffdis_jax.__main__ import run\nrun()\n")  # as pip writes it
  (tmp_path / "mysizes.py").write_text("BATCH = 11\n")
  (tmp_path / "mine.py").write_text(OWN)
  for program in (["-m", "diffdis_jax"], [str(tmp_path / "bin/diffdis")]):
    assert "batch_size = 11" in show(tmp_path, "mine.py", program)
