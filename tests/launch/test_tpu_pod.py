"""Test launch/tpu_pod.sh with a stand-in for gcloud. Commands for a host run here, in a folder."""

from __future__ import annotations

import pathlib
import subprocess
import time

import pytest

from tests.launch.programs import Answer, Programs, wait_for

pytestmark = pytest.mark.slow

SETTINGS = {"NAME": "run", "ZONE": "us-west4-a", "TYPE": "v5litepod-64", "RUNTIME": "v2", "POLL": "0"}
TRAIN = ["python", "-m", "diffdis_jax.train", "--workdir=gs://bucket/run", "--config.a=x 'y'"]
STATE, RUN, DONE = "queued-resources describe", "DIFFDIS_LAUNCHED=1", "grep -qx"
ACTIVE = Answer(stdout="ACTIVE\n")


def ended(*codes: int, gcloud: int = 0) -> Answer:
  return Answer(stdout="".join(f"host ended with code {code}\n" for code in codes), code=gcloud)


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> Programs:
  return Programs(tmp_path)


def test_every_host_of_every_slice_gets_the_command(programs):
  """One of four hosts is preempted, so the command is restarted on all of them."""
  programs.answer(
    {STATE: [ACTIVE], DONE: [Answer()], "ssh run-0": [ended(0, 0)], "ssh run-1": [ended(0, 75), ended(0, 0)]}
  )
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, SLICES="2", MAX_RESTARTS="0")
  assert done.returncode == 0 and "preempted; starting again" in done.stderr, done.stderr
  started = [call[5] for call in programs.calls if RUN in call[-1]]
  assert sorted(started[:2]) == sorted(started[2:]) == ["run-0", "run-1"]


def test_variables_are_handed_over_in_a_file_and_in_no_command(programs):
  """Anybody can read a command line in the list of processes, here and on the hosts."""
  programs.answer({STATE: [ACTIVE], RUN: [ended(0)]})
  names = dict(ENV="WANDB_API_KEY,HF_TOKEN", WANDB_API_KEY='it\'s $(a) "secret"', HF_TOKEN="t")
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, **names)
  assert done.returncode == 0, done.stderr
  assert "secret" not in str(programs.calls) and "secret" not in done.stdout + done.stderr
  remote_command = next(call[-1] for call in programs.calls if RUN in call[-1])
  assert "; . ./.env; rm -f .env; export DIFFDIS_LAUNCHED=1" in remote_command, "the file stays on the hosts"
  (file,) = (word for call in programs.calls for word in call if word.endswith("/.env"))
  assert not pathlib.Path(file).exists(), "the file stays on this machine"


@pytest.mark.parametrize(
  "answers, code, starts",
  [
    ([ended(75, 134, 75, gcloud=1), ended(1, 134, gcloud=1), ended(0)], 0, 3),
    ([ended(134, 2, gcloud=134)], 2, 1),
    ([ended(134, 130, gcloud=134)], 130, 1),
  ],
  ids=["a save and a dead host", "bad input", "Ctrl-C"],
)
def test_it_starts_again_unless_a_host_refused_its_input_or_was_interrupted(programs, answers, code, starts):
  programs.answer({STATE: [ACTIVE], RUN: answers})
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, MAX_RESTARTS="3")
  assert (done.returncode, sum(RUN in call[-1] for call in programs.calls)) == (code, starts), done.stderr


def test_a_lost_connection_leaves_the_command_and_the_next_attempt_waits(programs, tmp_path):
  home = tmp_path / "home"
  (home / "diffdis").mkdir(parents=True)
  attempts = home / "diffdis" / "attempts"
  command = "echo started >>attempts; while [[ ! -e end ]]; do sleep 0.05; done; echo ended >>attempts"

  def start() -> subprocess.Popen:
    printed = programs.run("tpu_pod.sh", "--dry-run", "run", "--", "bash", "-c", command, **SETTINGS).stdout
    remote_command = printed.splitlines()[-1].split("--command=")[1]
    script = subprocess.run(["bash", "-c", f"printf %s {remote_command}"], capture_output=True, text=True).stdout
    return subprocess.Popen(["bash", "-c", script], cwd=home, stdout=subprocess.PIPE, text=True)

  first = start()
  wait_for(attempts)
  first.stdout.close()  # this is how a host sees a lost connection
  second = start()
  time.sleep(0.5)
  assert attempts.read_text() == "started\n"
  (attempts.parent / "end").touch()
  second.communicate(timeout=20)
  first.wait(timeout=20)
  assert attempts.read_text().split() == ["started", "ended", "started", "ended"]
  assert second.returncode == 0
