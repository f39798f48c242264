"""Test launch/local.sh with small real processes: when it restarts or stops which of them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.launch.programs import ROOT, wait_for

pytestmark = pytest.mark.slow

# This is a process of a run. FOLDER/plan has one word for each attempt, which says what process 1 does. Process 0
# runs until it is asked to stop and then saves, unless the word is "stubborn". When no word is left, both finish.
PROCESS = """
import os, pathlib, signal, subprocess, sys, time
folder, me = pathlib.Path(sys.argv[1]), int(os.environ["DIFFDIS_PROCESS_ID"])
plan = (folder / "plan").read_text().split()
attempt = len(list(folder.glob(f"started.{me}.*")))
(folder / f"started.{me}.{attempt}").write_text(f"{os.getpid()} {os.environ['DIFFDIS_COORDINATOR_ADDRESS']}")
word = plan[attempt] if attempt < len(plan) else "finish"
print("started", flush=True)
def save(number, frame):
  (folder / f"saved.{me}.{attempt}").touch()
  sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if word == "stubborn" else save)
(folder / f"ready.{me}.{attempt}").touch()
if word == "finish":
  sys.exit(0)
if word == "wait" or me == 0:
  time.sleep(60)
while not (folder / f"ready.0.{attempt}").exists():
  time.sleep(0.01)
if word == "killed":
  os.kill(os.getpid(), signal.SIGKILL)
if word == "leaves":
  child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  (folder / "child").write_text(str(child.pid))
  os.kill(os.getpid(), signal.SIGKILL)
if word.startswith("saves"):
  step = folder / "checkpoints" / word[5:]
  step.mkdir(parents=True)
  (step / "commit_success.txt").touch()
  sys.exit(1)
sys.exit(int(word) if word.isdigit() else 1)
"""
Launch = Callable[..., subprocess.Popen]


@pytest.fixture
def launch(tmp_path: pathlib.Path):
  """Start the launcher on two of these processes with a plan, and kill the remaining processes at the end."""
  # A shell without job control makes a background command and its children ignore SIGINT. A signal that has a handler
  # here gets its default action in a child.
  stops = (signal.SIGINT, signal.SIGHUP)
  before = {number: signal.signal(number, signal.default_int_handler) for number in stops}
  started = []

  def start(plan: str, *flags: str, grace: int = 10) -> subprocess.Popen:
    (tmp_path / "plan").write_text(plan)
    command = [sys.executable, "-IS", "-c", PROCESS, str(tmp_path), "--workdir", str(tmp_path)]
    started.append(
      subprocess.Popen(
        ["launch/local.sh", "-n", "2", *flags, "--", *command],
        cwd=ROOT,
        env={**os.environ, "DELAY": "0", "GRACE": str(grace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return started[-1]

  yield start
  for number, handler in before.items():
    signal.signal(number, handler)
  for launcher in started:
    launcher.kill()
    launcher.communicate()
  for path in tmp_path.glob("started.*"):
    assert not is_alive(path), f"{path.name} was left running"


def is_alive(path: pathlib.Path) -> bool:
  """Return whether the process whose number begins the file runs and is no zombie."""
  try:
    state = pathlib.Path("/proc", path.read_text().split()[0], "stat").read_text()
  except FileNotFoundError:
    return False
  return state.rsplit(")", 1)[1].split()[0] != "Z"


def attempts(folder: pathlib.Path) -> int:
  counts = {len(list(folder.glob(f"started.{process}.*"))) for process in (0, 1)}
  assert len(counts) == 1, "one process was started more often than the other"
  return counts.pop()


def finish(launcher: subprocess.Popen) -> tuple[int, str, str]:
  out, err = launcher.communicate(timeout=30)
  return launcher.returncode, out, err


def test_starts_every_process_once_with_its_number_and_prefix(launch, tmp_path):
  code, out, err = finish(launch("finish"))
  assert (code, attempts(tmp_path), err) == (0, 1, "")
  assert sorted(out.splitlines()) == ["[0] started", "[1] started"]
  addresses = {path.read_text().split()[1] for path in tmp_path.glob("started.*")}
  assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:2")


@pytest.mark.parametrize("word", ["1", "killed"])
def test_survives_a_crash_and_a_dead_host(launch, tmp_path, word):
  code, _, err = finish(launch(word))
  assert (code, attempts(tmp_path)) == (0, 2)
  assert f"process 1 ended with code {137 if word == 'killed' else 1}" in err
  assert (tmp_path / "saved.0.0").exists(), "the other was stopped by something else than SIGTERM"


def test_starts_again_after_preemptions_without_counting_them(launch, tmp_path):
  code, _, err = finish(launch("75 143 75", "--restarts", "0"))
  assert (code, attempts(tmp_path)) == (0, 4)
  assert err.count("preempted; starting again") == 3


@pytest.mark.parametrize("word", ["2", "130"])
def test_never_starts_again_after_bad_input_or_ctrl_c(launch, tmp_path, word):
  code, _, _ = finish(launch(word))
  assert (code, attempts(tmp_path)) == (int(word), 1)


def test_gives_up_after_restarts_without_progress(launch, tmp_path):
  code, _, err = finish(launch("7 7 7", "--restarts", "1"))
  assert (code, attempts(tmp_path)) == (7, 2)
  assert "1 restarts brought no new checkpoint" in err


def test_a_new_checkpoint_resets_the_count(launch, tmp_path):
  """Checkpoints of step 9 and of step 10 each count as progress."""
  code, _, _ = finish(launch("1 saves9 saves10", "--restarts", "1"))
  assert (code, attempts(tmp_path)) == (0, 4)


def test_kills_a_process_that_does_not_stop(launch, tmp_path):
  begun = time.monotonic()
  code, _, err = finish(launch("stubborn", grace=1))
  assert (code, attempts(tmp_path)) == (0, 2)
  assert "process 0 ended with code 137" in err
  assert time.monotonic() - begun < 15  # without `grace` it would take 20


def test_kills_the_workers_of_a_dead_process(launch, tmp_path):
  code, _, _ = finish(launch("leaves"))
  assert (code, attempts(tmp_path)) == (0, 2)
  assert not is_alive(tmp_path / "child")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_passes_a_signal_on_and_does_not_start_again(launch, tmp_path, number):
  launcher = launch("wait wait")
  for process in (0, 1):
    wait_for(tmp_path / f"ready.{process}.0")
  launcher.send_signal(number)
  code, _, _ = finish(launcher)
  assert (code, attempts(tmp_path)) == (75, 1)
  assert {path.name for path in tmp_path.glob("saved.*")} == {"saved.0.0", "saved.1.0"}


def test_a_process_preempted_alone_restarts_all(launch, tmp_path):
  launcher = launch("wait")
  for process in (0, 1):
    wait_for(tmp_path / f"ready.{process}.0")
  os.kill(int((tmp_path / "started.0.0").read_text().split()[0]), signal.SIGTERM)
  code, _, _ = finish(launcher)
  assert (code, attempts(tmp_path)) == (0, 2)
  assert (tmp_path / "saved.1.0").exists()


def test_dry_run_prints_what_would_be_started(launch, tmp_path):
  code, out, _ = finish(launch("finish", "-d", "4", "--dry-run"))
  assert (code, attempts(tmp_path)) == (0, 0)
  assert [line.split()[:3] for line in out.splitlines()] == [["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"]] * 2
  assert "DIFFDIS_NUM_PROCESSES=2 DIFFDIS_PROCESS_ID=1" in out.splitlines()[1]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--", "true"], "-n is missing"),
    (["-n"], "-n needs a value"),
    (["-n", "two", "--", "true"], "-n is 'two'; it should be a whole number from 1 up"),
    (["-n", "2", "--restarts", "x", "--", "true"], "--restarts is 'x'; it should be a whole number from 0 up"),
    (["-n", "08", "--", "true"], "-n is '08'"),
    (["-n", "2"], "no command; give it after --"),
    (["-n", "2", "python", "-m", "x"], "unknown argument 'python'"),
  ],
)
def test_bad_usage_is_one_line(arguments, message):
  done = subprocess.run(["launch/local.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert done.stderr.startswith(f"local.sh: error: {message}")
