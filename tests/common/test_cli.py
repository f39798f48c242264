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
from diffdis_jax.common import cli, signals, usage
from diffdis_jax.errors import FULL_DISK
from diffdis_jax.evals import registry
from tests import forked

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


def start(folder, *flags: str, own_process: bool = True, **environment: str) -> subprocess.Popen[str]:
  """`python verb.py`, or else what is the same, `python -m verb` in its folder, without its imports."""
  env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TF_"))}
  env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
  command = [sys.executable, str(folder / "verb.py"), *flags] if own_process else [sys.executable, "-m", "verb", *flags]
  return forked.start(command, env, folder=folder, modules=["verb"])


def run(folder, *flags: str, own_process: bool = False, **environment: str) -> tuple[int, str, str]:
  process = start(folder, *flags, own_process=own_process, **environment)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_a_good_command_line_is_quiet_and_has_its_overrides(folder):
  flags = ["--config=tiny.py:runlocal,gamma=2", "--workdir=good"]
  overrides = ["--config.optim.rate=1", "--config.optim.betas=(0, 1)", "--config.init_from=X"]
  code, out, err = run(folder, *flags, *overrides, own_process=True, XDG_CACHE_HOME=str(folder / "home"))
  assert (code, err) == (0, "")
  cache, _, config = out.partition(" ")
  assert cache == f"{folder}/home/diffdis_jax/jax"
  assert json.loads(config) == {"gamma": 2.0, "init_from": "X", "optim": {"betas": [0, 1], "rate": 1.0}, "seed": 0}


def test_the_cache_folder_can_be_chosen(folder):
  flags = ["--config=tiny.py", "--workdir=good"]
  _, out, _ = run(folder, *flags, own_process=True, JAX_COMPILATION_CACHE_DIR=f"{folder}/mine")
  assert out.startswith(f"{folder}/mine ")


CACHE_OPTIONS = (
  *("jax_compilation_cache_dir", "jax_compilation_cache_max_size"),
  "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture
def cache_options(monkeypatch):
  """What the cache's options are now; restored afterwards."""
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
  yield lambda: [getattr(jax.config, name) for name in CACHE_OPTIONS]
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_cache_folder_that_cannot_be_made_is_one_line(cache_options, monkeypatch, tmp_path, caplog):
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  cli.compilation_cache()
  assert cache_options()[0] is None
  assert "compiled programs are not kept: cannot make" in caplog.text and "Not a directory" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_a_cache_folder_in_which_others_can_write_is_not_used(cache_options, monkeypatch, tmp_path, caplog, mode):
  """Whoever can write there can have this user run any program."""
  (tmp_path / "xla").mkdir()
  (tmp_path / "xla").chmod(mode)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
  cli.compilation_cache()
  assert cache_options()[0] is None
  (message,) = caplog.messages
  assert "are not kept: others can write into" in message and "JAX_COMPILATION_CACHE_DIR" in message


def test_a_cache_folder_of_another_user_is_not_used(cache_options, monkeypatch, tmp_path, caplog):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  tmp_path.chmod(0o755)
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  cli.compilation_cache()
  assert cache_options()[0] is None and "belongs to another user" in caplog.text


def test_a_cache_in_a_bucket_is_one_that_somebody_named(cache_options, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/xla")
  cli.compilation_cache()
  assert cache_options() == ["gs://bucket/xla", -1, "none"]


def test_the_users_cache_has_a_limit_and_loses_what_a_killed_process_left(cache_options, monkeypatch, tmp_path):
  """Beside an entry without a date jax writes no other."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # which would be this folder
  folder = tmp_path / "diffdis_jax" / "jax"
  folder.mkdir(parents=True, mode=0o755)
  for name in ("whole-cache", "whole-atime", "part-cache"):
    (folder / name).touch()
  cli.compilation_cache()
  assert cache_options()[:2] == [str(folder), cli.CACHE_BYTES]
  assert sorted(each.name for each in folder.iterdir() if each.name[0] != ".") == ["whole-atime", "whole-cache"]


GOOD = ("--config=tiny.py", "--workdir=run")


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
    (GOOD + ("--fail=right",), "error: cannot continue: Permission denied"),
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


def test_a_full_disk_is_one_line_on_which_launchers_try_again(folder):
  said = "error: No space left on device (run/file); make room, and run the same command again\n"
  assert run(folder, *GOOD, "--fail=full") == (1, "", said)


@pytest.mark.parametrize("kind, said", [("net", "Connection refused"), ("server", "Forbidden: b/run someone does not")])
def test_what_may_pass_is_one_line_on_which_launchers_try_again(folder, kind, said):
  code, out, err = run(folder, *GOOD, f"--fail={kind}")
  assert (code, out, err.count("\n")) == (1, "", 1)
  assert err.startswith("error: ") and said in err


def test_a_bug_keeps_its_traceback(folder):
  code, _, err = run(folder, *GOOD, "--fail=bug", own_process=True)
  assert code == 1
  assert "Traceback" in err and "RuntimeError: a bug" in err


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
    failed, _, err = run(folder, *GOOD, port, "--process=1", f"--fail={kind}", own_process=True)
    assert failed == code and message in err
    assert time.monotonic() - begin < 30
  finally:
    other.kill()
    other.communicate()


COMMANDS = [*main_module.commands()]
FLAG = re.compile(r"^  --(?:\[no\])?(\w+)(?:=\S+)? *\n? *(\(required\))?", re.MULTILINE)
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


def groups(shown: str) -> dict[str, list[str]]:
  """The names of the flags by the heading over them, of a --help."""
  _, *parts = re.split(r"^(Flags.*):$", shown, flags=re.MULTILINE)
  return {title: [name for name, _ in FLAG.findall(text)] for title, text in zip(parts[::2], parts[1::2], strict=True)}


def test_an_example_stands_first_in_every_help_and_its_flags_exist():
  for command, shown in helps().items():
    example, what = shown.split("\n\n")[:2]
    assert example.startswith(f"diffdis {command} "), shown
    assert " ".join(what.split()).startswith(main_module.commands()[command]), shown
    names = {name for each in groups(shown).values() for name in each}
    lines = re.findall(rf"diffdis {command} .*", shown.replace("\\\n", " "))
    used = {name.removeprefix("no") for name in re.findall(r"--(\w+)", " ".join(lines))}
    assert used and used <= names, f"{command}: {used - names}"
    assert max(map(len, shown.splitlines())) <= usage.WIDTH and "no help available" not in shown


def test_a_required_flag_is_marked_in_every_help_and_leaving_it_out_is_an_error(tmp_path):
  without = said(*[(command,) for command in COMMANDS])
  for (command, shown), (code, error) in zip(helps().items(), without, strict=True):
    marked = {name for name, mark in FLAG.findall(shown) if mark}
    # Without any flag, absl names all that it asks for.
    missing = {*re.findall(r"--(\w+) \(", error)} if code else set()
    assert code == (2 if missing else 0)
    assert missing | {name for of, name in ASKED_FOR if of == command} == marked, shown
  lines = [(command, *line.split()) for (command, _), (line, _) in ASKED_FOR.items()]
  for (name, (_, message)), (code, error) in zip(
    ASKED_FOR.items(), said(*lines, folder=tmp_path, run=True), strict=True
  ):
    assert code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1, f"{name}: {error}"
  assert not [*tmp_path.iterdir()]


def test_flags_of_processes_come_last_in_every_help_that_has_them():
  processes = {"coordinator_address", "num_processes", "process_id", "coordinator_timeout", "heartbeat_timeout"}
  having = set()
  for command, shown in helps().items():
    found = groups(shown)
    assert [*found][0] == usage.GENERAL and {"quiet", "version"} <= {*found[usage.GENERAL]}
    assert not {name for each in found.values() for name in each} & {"alsologtostderr", "verbosity", "tfds_dir"}
    if usage.PROCESSES in found:
      having.add(command)
      assert [*found][-1] == usage.PROCESSES and {*found[usage.PROCESSES]} == processes
      assert not processes & {name for title, each in found.items() if title != usage.PROCESSES for name in each}
  assert having == {"ablate", "evaluate", "generate", "train"}


def test_evaluates_flags_stand_with_the_task_that_takes_them():
  found = groups(helps()["evaluate"])
  for task in registry.EVALS:
    for name in registry.settings_of(task):
      of = [each for each in registry.EVALS if name in registry.settings_of(each)]
      assert name in found[f"Flags of {task}" if of == [task] else "Flags of several tasks"]
  assert found["Flags of a suite"] == ["suite", "data_root", "incomplete"] and found["Flags of compare"] == ["compare"]


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
  assert max(map(len, listed.splitlines())) <= usage.WIDTH


def test_a_command_that_does_not_exist_is_one_line(capsys):
  assert main_module.main(["evalute"]) == 2
  assert capsys.readouterr().err == "error: no command 'evalute'; did you mean evaluate?\n"
  assert main_module.main(["xyz"]) == 2
  assert capsys.readouterr().err == "error: no command 'xyz'; diffdis --help lists them\n"


@pytest.mark.parametrize("command", [["--help"], ["config", "--help"], ["config", "show", "shapes"]])
@pytest.mark.parametrize("where", ["| true", ">&-", "<&- >&- 2>&-"])
def test_nobody_who_reads_what_is_said_is_no_error(command, where):
  """As behind `| head`, of which the first lines were enough, or of what is started without any stream."""
  line = shlex.join([sys.executable, "-m", "diffdis_jax", *command])
  # The code of the command, not that of the reader.
  done = subprocess.run(
    ["bash", "-c", f"{line} {where}; echo ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.stdout, done.stderr) == ("0\n", "")


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
