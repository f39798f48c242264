"""launch/tpu_pod.sh with a gcloud that records what it is asked; what it sends to hosts is run here, too."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time

import pytest

from tests.interrupting import is_alive, not_ignored
from tests.launch.programs import ROOT, Answer, Programs, wait_for

pytestmark = pytest.mark.slow

SETTINGS = {"NAME": "run", "ZONE": "us-west4-a", "TYPE": "v5litepod-64", "RUNTIME": "v2", "POLL": "0"}
TRAIN = ["python", "-m", "diffdis_jax.train", "--workdir=gs://bucket/run", "--config.a=x 'y'"]
STATE, RUN, DONE = "queued-resources describe", "DIFFDIS_LAUNCHED=1", "grep -qx"
ACTIVE = Answer(stdout="ACTIVE\n")
NONE = Answer(code=1, stderr="ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource\n")


def said(*codes: int, gcloud: int = 0) -> Answer:
  return Answer(stdout="".join(f"host ended with code {code}\n" for code in codes), code=gcloud)


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> Programs:
  return Programs(tmp_path)


def kinds(programs: Programs) -> list[str]:
  """Of gcloud's calls: describe, create, delete, scp, run, or ssh for what else is done on hosts."""
  words = {"describe": "describe", "queued-resources create": "create", "delete": "delete", "scp": "scp", RUN: "run"}
  found = []
  for call in programs.calls:
    text = " ".join(call)
    found.append(next((kind for key, kind in words.items() if key in text), "ssh" if "ssh" in call else "other"))
  return found


def run(programs: Programs, *answers: Answer, states: tuple[Answer, ...] = (ACTIVE,), restarts: int = 3):
  programs.answer({STATE: states, RUN: answers})
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, MAX_RESTARTS=str(restarts))
  return done.returncode, kinds(programs).count("run"), done.stderr


def test_create_waits_until_the_slice_is_there(programs):
  programs.answer({STATE: [NONE, Answer(stdout="WAITING_FOR_RESOURCES\n"), Answer(stdout="PROVISIONING\n"), ACTIVE]})
  done = programs.run("tpu_pod.sh", "create", **SETTINGS, SPOT="1", PROJECT="p")
  assert done.returncode == 0, done.stderr
  assert kinds(programs) == ["describe", "create", "describe", "describe", "describe"]
  resource = ["gcloud", "compute", "tpus", "queued-resources"]
  where = ["run", "--zone=us-west4-a", "--project=p"]
  what = ["--node-id=run", "--accelerator-type=v5litepod-64", "--runtime-version=v2", "--spot"]
  assert programs.calls[1] == [*resource, "create", *where, *what]
  assert programs.calls[0] == [*resource, "describe", *where, "--format=value(state.state)"]


def test_every_host_of_every_slice_gets_the_command(programs):
  programs.answer(
    {STATE: [ACTIVE], DONE: [Answer()], "ssh run-0": [said(0, 0)], "ssh run-1": [said(0, 75), said(0, 0)]}
  )
  settings = {**SETTINGS, "SLICES": "2", "MAX_RESTARTS": "0", "ENV": "HF_TOKEN", "HF_TOKEN": "t"}
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **settings)
  assert done.returncode == 0, done.stderr
  # One of four hosts was preempted, so that the command is started again on all.
  started = [call[5] for call in programs.calls if RUN in call[-1]]
  assert sorted(started[:2]) == sorted(started[2:]) == ["run-0", "run-1"]
  assert "preempted; starting again" in done.stderr
  copied = [call[6] for call in programs.calls if "scp" in call]
  assert sorted(copied) == ["run-0:diffdis/", "run-0:diffdis/", "run-1:diffdis/", "run-1:diffdis/"]


def test_setup_happens_once_on_all_hosts(programs):
  programs.answer({DONE: [Answer(code=1), Answer()]})
  for _ in range(2):
    assert programs.run("tpu_pod.sh", "setup", **SETTINGS).returncode == 0
  assert kinds(programs) == ["ssh", "scp", "ssh", "ssh"]
  assert all("--worker=all" in call for call in programs.calls)
  install = programs.calls[2][-1]
  commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
  assert "uv pip install" in install and "'.[tpu]'" in install and install.endswith(f"echo '{commit} tpu' >.commit")


def test_variables_are_handed_over_in_a_file_and_in_no_command(programs, tmp_path):
  """A command shows in the list of processes, here and on the hosts."""
  programs.answer({STATE: [ACTIVE], RUN: [said(0)]})
  secret = 'it\'s $(a) "secret"'
  names = dict(ENV="WANDB_API_KEY,HF_TOKEN", WANDB_API_KEY=secret, HF_TOKEN="t")
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, **names)
  assert done.returncode == 0, done.stderr
  copied = [record for record in programs.records if "scp" in record["call"] and "run:diffdis/" in record["call"]]
  assert len(copied) == 1 and "--worker=all" in copied[0]["call"]
  assert "secret" not in str(programs.calls) and "secret" not in done.stdout + done.stderr
  sent = next(call[-1] for call in programs.calls if RUN in call[-1])
  assert "; . ./.env; rm -f .env; export DIFFDIS_LAUNCHED=1" in sent, "it is left on the hosts"
  file = next(word for word in copied[0]["call"] if word.endswith("/.env"))
  assert not pathlib.Path(file).exists(), "it is left on this machine"


def test_restarts_after_a_save_and_after_a_dead_host(programs):
  code, runs, err = run(programs, said(75, 134, 75, gcloud=1), said(1, 134, gcloud=1), said(0))
  assert (code, runs) == (0, 3)
  assert "preempted; starting again" in err and "ended with code 255; starting again (1 of 3" in err


@pytest.mark.parametrize("meant", [2, 130])
def test_bad_input_or_ctrl_c_ends_it_whatever_others_died_of(programs, meant):
  code, runs, _ = run(programs, said(134, meant, gcloud=134))
  assert (code, runs) == (meant, 1)


@pytest.mark.parametrize("send, number", [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)])
def test_a_signal_tells_the_hosts_to_save_and_starts_nothing_again(programs, tmp_path, send, number):
  """Ctrl-C in a terminal ends gcloud as well: the hosts are asked again how the command ended, which may still save."""
  (tmp_path / "gcloud").write_text(f"""#!/bin/bash
case "$*" in
  *describe*) echo ACTIVE ;;
  *"kill -TERM"*) touch {tmp_path}/told ;;
  *"{RUN}"*{TRAIN[2]}*) echo >>{tmp_path}/begun
    for i in {{1..200}}; do [[ -e {tmp_path}/told ]] && break; sleep 0.05; done
    [[ ! -e {tmp_path}/told ]] || echo "host ended with code 75"; exit 1 ;;
  *"{RUN}"*) echo "host ended with code 75"; exit 75 ;;
esac
""")
  command = ["launch/tpu_pod.sh", "run", "--", *TRAIN]
  with not_ignored():
    launcher = subprocess.Popen(command, cwd=ROOT, env=programs.environment(**SETTINGS), start_new_session=True)
  wait_for(tmp_path / "begun")
  send(launcher.pid, number)
  assert launcher.wait(20) == 75
  assert (tmp_path / "begun").read_text() == "\n"
  wait_for(tmp_path / "told")


class Host:
  """A folder that stands for a host's home, and what the launcher sends there."""

  def __init__(self, programs: Programs, home: pathlib.Path, *command: str):
    self.folder = home / "diffdis"
    self.folder.mkdir()
    self._programs, self._home, self._command = programs, home, command
    self.attempt()

  def attempt(self) -> None:
    """From here on, what the launcher sends in another attempt."""
    done = self._programs.run("tpu_pod.sh", "--dry-run", "run", "--", *self._command, **SETTINGS)
    sent = done.stdout.splitlines()[-1].split("--command=")[1]
    self._script = subprocess.run(["bash", "-c", f"printf %s {sent}"], capture_output=True).stdout

  def start(self) -> subprocess.Popen:
    environment = {**os.environ, "PATH": os.environ["PATH"]}
    return subprocess.Popen(
      ["bash", "-c", self._script.decode()], cwd=self._home, env=environment, stdout=subprocess.PIPE, text=True
    )

  def stop(self) -> subprocess.CompletedProcess:
    """Runs what `stop` sends to a host."""
    assert self._programs.run("tpu_pod.sh", "stop", **SETTINGS).returncode == 0
    sent = self._programs.calls[-1][-1].removeprefix("--command=")
    return subprocess.run(["bash", "-c", sent], cwd=self._home, capture_output=True, text=True, timeout=20)


def test_a_lost_connection_leaves_the_command_and_the_next_attempt_waits(programs, tmp_path):
  home = tmp_path / "home"
  home.mkdir()
  script = "echo started >>attempts; while [[ ! -e end ]]; do sleep 0.05; done; echo ended >>attempts"
  host = Host(programs, home, "bash", "-c", script)
  first = host.start()
  wait_for(host.folder / "attempts")
  first.stdout.close()  # what a lost connection is to the host
  host.attempt()
  second = host.start()
  time.sleep(0.5)
  assert (host.folder / "attempts").read_text() == "started\n"
  (host.folder / "end").touch()
  second.communicate(timeout=20)
  first.wait(timeout=20)
  assert (host.folder / "attempts").read_text().split() == ["started", "ended", "started", "ended"]
  assert second.returncode == 0


@pytest.fixture
def host(programs, tmp_path):
  """Makes a host, with a command; ends what is left of it."""
  home, made = tmp_path / "home", []
  home.mkdir()

  def make(*command: str) -> Host:
    made.append(Host(programs, home, *command))
    return made[-1]

  yield make
  path = made[0].folder / "pid"
  if path.exists() and is_alive(path.read_text().strip()):
    os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
  "arguments, settings, said_",
  [
    ([], SETTINGS, "no subcommand: create, setup"),
    (["start"], SETTINGS, "unknown subcommand 'start'"),
    (["--spot", "create"], SETTINGS, "unknown argument '--spot'"),
    (["run"], SETTINGS, "no command; give it after --"),
    (["run", "python"], SETTINGS, "unknown argument 'python'; the command goes after --"),
    (["create", "now"], SETTINGS, "create takes no argument, but was given 'now'"),
    (["create"], {**SETTINGS, "ZONE": ""}, "set ZONE, as in"),
    (["run", "--", "true"], {**SETTINGS, "TYPE": ""}, "set TYPE, as in"),
    (["run", "--", "true"], {**SETTINGS, "MAX_RESTARTS": "x"}, "MAX_RESTARTS is 'x'"),
    (["create"], {**SETTINGS, "SPOT": "no"}, "SPOT is 'no'; it should be 1 or 0"),
  ],
)
def test_bad_usage_is_one_line(programs, arguments, settings, said_):
  done = programs.run("tpu_pod.sh", *arguments, **settings)
  assert (done.returncode, done.stdout, done.stderr.count("\n"), programs.calls) == (2, "", 1, [])
  assert done.stderr.startswith(f"tpu_pod.sh: error: {said_}")


def test_dry_run_prints_the_commands_and_calls_nothing(programs):
  done = programs.run("tpu_pod.sh", "--dry-run", "run", "--", *TRAIN, **SETTINGS)
  assert (done.returncode, programs.calls) == (0, [])
  assert [line.split()[3:5] for line in done.stdout.splitlines()] == [
    ["queued-resources", "create"],
    ["tpu-vm", "scp"],
    ["tpu-vm", "ssh"],
    ["tpu-vm", "ssh"],
  ]
