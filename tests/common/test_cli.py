"""Command lines as a user types them, on a verb that does nothing."""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import time

import jax
import pytest

import diffdis_jax
from diffdis_jax import __main__ as main_module
from diffdis_jax.common import cli, signals
from diffdis_jax.errors import FULL_DISK
from tests import command_runs

ROOT = pathlib.Path(__file__).parents[2]

VERB = """
import sys
import time
from absl import flags, logging
from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
STEPS = flags.DEFINE_integer("steps", 3, "sampling steps")
PROCESS = flags.DEFINE_integer("process", None, "index of this process, of two")
PORT = flags.DEFINE_integer("port", None, "port of the first of them")
SAY = flags.DEFINE_boolean("say", False, "write to the log")
FAIL = flags.DEFINE_enum("fail", None, ["user", "bug", "folder", "full", "net", "server", "right"], "how to fail")


def main(_):
  cli.compilation_cache()
  import jax
  from orbax import checkpoint

  if PROCESS.value is not None:
    jax.distributed.initialize(f"localhost:{PORT.value}", 2, PROCESS.value)
  if SAY.value:
    logging.warning("a warning")
    processes.log_place()
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
  if PROCESS.value is not None:
    time.sleep(3600)
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


def test_the_cache_folder_can_be_chosen(folder):
  flags = ["--config=tiny.py", "--workdir=good"]
  _, out, _ = run(folder, *flags, JAX_COMPILATION_CACHE_DIR=f"{folder}/mine")
  assert out.startswith(f"{folder}/mine ")


GOOD = ("--config=tiny.py", "--workdir=run")


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags, message",
  [
    (GOOD + ("--config.optim.rat=1",), "unknown config key optim.rat; did you mean optim.rate?"),
    (GOOD + ("--config.rate", "1"), "unknown config key rate; did you mean optim.rate?"),
    (GOOD + ("--rate=1",), "unknown flag --rate; did you mean --config.optim.rate?"),
    (GOOD + ("--config.seed.x=1",), "unknown config key seed.x; did you mean seed?"),
    (GOOD + ("--config.zzzz=1",), "unknown config key zzzz; known: gamma, init_from, optim.betas, optim.rate, seed"),
    (GOOD + ("--config.seed=abc",), "flag --config.seed=abc: invalid literal for int()"),
    (GOOD + ("--config.optim=3",), "flag --config.optim=3: Failed to parse '3' as a ConfigDict"),
    (GOOD + ("--config.optim.betas=(1,",), "flag --config.optim.betas=(1,: Error while parsing"),
    (GOOD + ("--stps=3",), "unknown flag --stps; did you mean --steps?"),
    (GOOD + ("--steps=many",), "flag --steps=many: invalid literal for int()"),
    (GOOD + ("--fail=no",), "flag --fail=no: value should be one of <user|bug|folder|full|net|server|right>"),
    (GOOD + ("--fail=right",), "error: cannot use a file: Permission denied"),
    (GOOD[:1] + ("--workdir=s3://b/run",), "s3://b/run is no address that can be read; give a local path or gs://"),
    (GOOD + ("--config.init_from=gs:/b",), "gs:/b is no address that can be read"),
    (GOOD[:1] + (f"--workdir={'a' * 5000}",), "File name too long"),
    (GOOD + ("extra",), "unexpected argument 'extra'; every argument is a flag, --name=value"),
    (GOOD[:1], "error: --workdir (folder of the run) is missing\n"),
    (GOOD[1:], "error: --config (configuration: NAME[:args] of one that comes with the package, or FILE.py[:args]) is"),
    ((), "or FILE.py[:args]) and --workdir (folder of the run) are missing\n"),
    (GOOD[:1] + ("--workdir=",), "error: --workdir= is empty; give a path\n"),
    (GOOD + ("--config.optim.betas[9]=1",), "out of range"),
    (GOOD + ("--fail=folder",), "error: cannot use "),
    (("--config=tny.py", "--workdir=run"), "no config tny.py; did you mean tiny.py?"),
    (("--config=shape", "--workdir=run"), "no config shape; did you mean shapes?"),
    (("--config=tiny.txt", "--workdir=run"), "--config=tiny.txt should name a config such as shapes, or a Python file"),
    (("--config=tiny.py:gama=1", "--workdir=run"), "unknown argument 'gama'; known: gamma, runlocal"),
    (("--config=wrong.py", "--workdir=run"), "--config=wrong.py: NameError: name 'nothing' is not defined (line 2)"),
    (("--config=silent.py", "--workdir=run"), "--config=silent.py: get_config returned None; it should end with"),
    (("--config=none.py", "--workdir=run", "--config.top.k=3"), "--config.top.k cannot be set: the config has None"),
    (GOOD + ("--fail=user",), "first line second line"),
  ],
)
def test_bad_input_is_one_line(folder, flags, message):
  (folder / "wrong.py").write_text("def get_config():\n  return nothing\n")
  (folder / "silent.py").write_text("def get_config():\n  pass\n")
  (folder / "none.py").write_text("def get_config():\n  return dict(top=dict(k=None))\n")
  (folder / "tiny.txt").write_text("{}")
  code, out, err = run(folder, *flags)
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
  assert message in err
  assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_on_which_launchers_try_again(folder):
  said = "error: No space left on device (run/file); make room, and run the same command again\n"
  assert run(folder, *GOOD, "--fail=full") == (1, "", said)


@pytest.mark.slow
@pytest.mark.parametrize("kind, said", [("net", "Connection refused"), ("server", "Forbidden: b/run someone does not")])
def test_what_may_pass_is_one_line_on_which_launchers_try_again(folder, kind, said):
  code, out, err = run(folder, *GOOD, f"--fail={kind}")
  assert (code, out, err.count("\n")) == (1, "", 1)
  assert err.startswith("error: ") and said in err


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(folder):
  code, _, err = run(folder, *GOOD, "--fail=bug")
  assert code == 1
  assert "Traceback" in err and "RuntimeError: a bug" in err


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, code, message", [("bug", 1, "RuntimeError: a bug"), ("user", 2, "error: first line second line\n")]
)
def test_one_of_two_processes_fails_at_once(folder, kind, code, message):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = f"--port={probe.getsockname()[1]}"
  other = start(folder, *GOOD, port, "--process=0")
  try:
    begin = time.monotonic()
    failed, _, err = run(folder, *GOOD, port, "--process=1", f"--fail={kind}")
    assert failed == code and message in err
    assert time.monotonic() - begin < 30
  finally:
    other.kill()
    other.communicate()


COMMANDS = [*main_module.commands()]
FLAG = re.compile(r"^  --(?:\[no\])?(\w+):", re.MULTILINE)
# Flags that a command asks for in some calls alone: the call, and what it says is missing.
ASKED_FOR = {
  ("evaluate", "workdir"): ("--out=F.json", "--workdir=DIR is missing"),
  ("prepare_data", "source"): ("cc3m --out=DIR", "prepare_data cc3m needs --source=DIR"),
  ("prepare_data", "out"): ("cc3m --source=DIR", "prepare_data cc3m needs --out=DIR"),
  ("prepare_data", "workdir"): ("latents --data=DIR --out=DIR2", "prepare_data latents needs --workdir=DIR"),
  ("prepare_data", "data"): ("latents --workdir=DIR --out=DIR2", "prepare_data latents needs --data=DIR"),
}


@functools.cache
def said(*lines: tuple[str, ...], folder: pathlib.Path = ROOT, run: bool = False) -> list[tuple[int, str]]:
  """Exit code and words of each of these commands, whose flags are parsed in one process, and no more but for `run`."""
  command = [sys.executable, str(ROOT / "tests" / "parse_commands.py"), *(["--run"] if run else [])]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  given = json.dumps(lines)
  done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, input=given, check=True)
  return [(code, text) for code, text in json.loads(done.stdout)]


def helps() -> dict[str, str]:
  answers = said(*[(command, "--help") for command in COMMANDS])
  assert [code for code, _ in answers] == [0] * len(COMMANDS)
  return {command: text for command, (_, text) in zip(COMMANDS, answers, strict=True)}


@pytest.mark.slow
def test_every_help_begins_with_its_command_and_an_example_whose_flags_exist():
  for command, shown in helps().items():
    assert " ".join(shown.split()).startswith(main_module.commands()[command]), shown
    assert f"diffdis {command} " in shown
    names = set(FLAG.findall(shown.partition("\nFlags:\n")[2]))
    lines = re.findall(rf"diffdis {command} .*", shown.replace("\\\n", " "))
    used = {name.removeprefix("no") for name in re.findall(r"--(\w+)", " ".join(lines))}
    assert used and used <= names, f"{command}: {used - names}"
    assert "quiet" in names and not names & {"alsologtostderr", "verbosity", "tfds_dir"}


@pytest.mark.slow
def test_a_flag_that_a_command_needs_is_named_where_it_is_missing(tmp_path):
  lines = [(command, *line.split()) for (command, _), (line, _) in ASKED_FOR.items()]
  for (name, (_, message)), (code, error) in zip(
    ASKED_FOR.items(), said(*lines, folder=tmp_path, run=True), strict=True
  ):
    assert code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1, f"{name}: {error}"
  assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_version_of_every_command(capsys):
  expected = f"diffdis_jax {diffdis_jax.__version__}\n"
  assert said(*[(command, "--version") for command in COMMANDS]) == [(0, expected)] * len(COMMANDS)
  assert main_module.main(["--version"]) == 0
  assert capsys.readouterr().out == expected


def test_every_command_is_listed_and_says_how_it_is_called(capsys):
  commands = main_module.commands()
  assert {"train", "report", "evaluate"} <= {*commands}
  for command, what in commands.items():
    assert 10 < len(what) < 120 and not what.endswith(".")
    place = ROOT / "diffdis_jax" / command
    file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    assert f"diffdis {command}" in file.read_text()
  assert main_module.main([]) == 0
  listed = capsys.readouterr().out
  assert all(f"  {command} " in listed and what in listed for command, what in commands.items())


def test_a_command_that_does_not_exist_is_one_line(capsys):
  assert main_module.main(["evalute"]) == 2
  assert capsys.readouterr().err == "error: no command 'evalute'; did you mean evaluate?\n"
  assert main_module.main(["xyz"]) == 2
  assert capsys.readouterr().err == "error: no command 'xyz'; diffdis --help lists them\n"


@pytest.mark.parametrize("command", [["config", "--help"], ["config", "show", "shapes"]])
def test_nobody_who_reads_what_is_said_is_no_error(command):
  """As behind `| head`, of which the first lines were enough."""
  line = shlex.join([sys.executable, "-m", "diffdis_jax", *command])
  # The code of the command, not that of the reader.
  done = subprocess.run(
    ["bash", "-c", f"{line} | true; echo ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.slow
def test_quiet_leaves_warnings(folder):
  code, out, err = run(folder, *GOOD, "--quiet", "--say")
  assert code == 0 and "a warning" in err and "host 0 of 1" not in err
  _, _, err = run(folder, *GOOD, "--say")
  assert "a warning" in err and "host 0 of 1" in err


def test_a_bucket_that_sees_no_login_says_which_one_it_takes(capsys):
  """Of gcloud's two logins the usual one is not enough."""
  from gcsfs.retry import HttpError  # here, since it takes a second

  message = "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."
  with pytest.raises(SystemExit) as raised:
    cli._stop_for(HttpError({"code": 401, "message": message}))
  assert raised.value.code == 1
  asked = "; log in by gcloud auth application-default login, and run the same command again"
  assert capsys.readouterr().err == f"error: {message}, 401{asked}\n"


def test_a_message_gives_a_terminal_no_orders(capsys):
  with pytest.raises(SystemExit):
    cli._stop("no class a\x1b[31m\nb \ud800 größer")
  assert capsys.readouterr().err == "error: no class a\\x1b[31m b \\ud800 größer\n"


def test_a_library_that_logs_an_interruption_or_a_full_disk_is_not_heard():
  """Each is one line at the end."""
  quiet = KeyboardInterrupt(), signals.Terminated(), *(ValueError(f"to file 14: {os.strerror(n)}") for n in FULL_DISK)
  for error, heard in (*((each, False) for each in quiet), (RuntimeError(), True)):
    what = (type(error), error, None)
    record = logging.LogRecord("orbax", logging.ERROR, "/orbax/manager.py", 1, "a thread failed", None, what)
    assert cli._is_ours(record) is heard


def test_a_save_between_two_evaluations_is_no_warning(tmp_path, caplog):
  """As half of the saves of configs/clip_cc3m.py, which keeps the best checkpoint."""
  from diffdis_jax.config.sections import CheckpointPolicy
  from diffdis_jax.run import checkpoint
  from diffdis_jax.structs import TrainState

  with checkpoint.Checkpointer(tmp_path, CheckpointPolicy(keep_best=1, best_metric="a")) as checkpointer:
    checkpointer.save(1, TrainState(params={"a": jax.numpy.zeros(1)}))
  warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
  assert warned and not any(map(cli._is_ours, warned))


OWN = """{more}from diffdis_jax.configs import common, shapes

def get_config():
  config = shapes.get_config()
  config.batch_size = {batch}
  return config
"""


def show(folder: pathlib.Path, name: str, program=("-m", "diffdis_jax")) -> str:
  """Return what `config show` says in another folder."""
  command = [sys.executable, *program, "config", "show", name, "--fields=batch_size"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


def test_a_config_is_found_by_its_name_in_another_folder(tmp_path):
  assert {*cli.config_names()} == {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
  (tmp_path / "shapes").mkdir()  # of a run, perhaps
  (tmp_path / "configs").mkdir()  # of another project
  (tmp_path / "configs/common.py").write_text("raise AssertionError")
  assert "batch_size = 48" in show(tmp_path, "shapes")


def test_ones_own_file_finds_the_packages_modules_and_ones_own(tmp_path):
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin/diffdis").write_text("from diffdis_jax.__main__ import run\nrun()\n")  # as pip writes it
  (tmp_path / "mysizes.py").write_text("BATCH = 11\n")
  (tmp_path / "mine.py").write_text(OWN.format(more="import mysizes\n", batch="mysizes.BATCH"))
  for program in (["-m", "diffdis_jax"], [str(tmp_path / "bin/diffdis")]):
    assert "batch_size = 11" in show(tmp_path, "mine.py", program)


def test_ones_own_file_may_have_dataclasses(tmp_path):
  sizes = "import dataclasses\n\n@dataclasses.dataclass\nclass Size:\n  batch: int = 9\n\n"
  more = f"from __future__ import annotations\n{sizes}"
  (tmp_path / "mine.py").write_text(OWN.format(more=more, batch="Size().batch"))
  assert "batch_size = 9" in show(tmp_path, "mine.py")
