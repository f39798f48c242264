"""launch/tpu_pod.sh with a gcloud that records what it is asked; what it sends to hosts is run here, too."""

from __future__ import annotations

import os
import pathlib
import shlex
import signal
import subprocess
import tarfile
import time

import pytest

from diffdis_jax.run import provenance
from tests.interrupting import is_alive, not_ignored
from tests.launch.programs import ROOT, Answer, Programs, wait_for

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


def test_create_hands_further_flags_through_and_asks_for_several_slices(programs):
  programs.answer({STATE: [NONE, ACTIVE]})
  flags = "--reserved --network=a  --service-account=b@c"
  done = programs.run("tpu_pod.sh", "create", **SETTINGS, SLICES="3", CREATE_FLAGS=flags)
  assert done.returncode == 0, done.stderr
  asked = programs.calls[1]
  assert {"--node-count=3", "--node-prefix=run"} <= set(asked) and not any("--node-id" in word for word in asked)
  assert asked[-3:] == flags.split()


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


def test_slices_that_are_no_number_are_refused(programs):
  done = programs.run("tpu_pod.sh", "create", **SETTINGS, SLICES="two")
  assert done.returncode == 2 and "SLICES is 'two'" in done.stderr and not programs.calls


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_create_replaces_what_is_over(programs, state):
  programs.answer({STATE: [Answer(stdout=f"{state}\n"), NONE, ACTIVE]})
  assert programs.run("tpu_pod.sh", "create", **SETTINGS).returncode == 0
  assert kinds(programs) == ["describe", "delete", "describe", "create", "describe"]
  assert programs.calls[1][-2:] == ["--force", "--quiet"]


def test_create_does_not_ask_for_ever(programs):
  programs.answer({STATE: [NONE, Answer(stdout="FAILED\n")]})
  done = programs.run("tpu_pod.sh", "create", **SETTINGS)
  assert (done.returncode, kinds(programs)) == (1, ["describe", "create", "describe"])
  assert "the request for v5litepod-64 failed" in done.stderr


def test_create_asks_for_nothing_when_gcloud_cannot_tell(programs):
  programs.answer({STATE: [Answer(code=1, stderr="ERROR: you do not currently have an active account\n")]})
  done = programs.run("tpu_pod.sh", "create", **SETTINGS)
  assert (done.returncode, kinds(programs)) == (1, ["describe"])
  assert "active account" in done.stderr


def test_a_gcloud_that_fails_once_ends_no_wait(programs):
  """A slice may be waited for for days."""
  away = Answer(code=1, stderr="ERROR: Unable to find the server at tpu.googleapis.com\n")
  states = (NONE, Answer(stdout="WAITING_FOR_RESOURCES\n"), away, away, ACTIVE)
  assert run(programs, said(0), states=states, restarts=0) == (0, 1, away.stderr * 2)
  assert kinds(programs).count("create") == 1


@pytest.mark.parametrize("spot, asked", [("", False), ("0", False), ("1", True)])
def test_spot_is_asked_for_by_1_alone(programs, spot, asked):
  programs.answer({STATE: [NONE, ACTIVE]})
  assert programs.run("tpu_pod.sh", "create", **SETTINGS, SPOT=spot).returncode == 0
  assert ("--spot" in programs.calls[1]) == asked


def test_nothing_is_rented_for_a_commit_that_cannot_be_copied(programs, tmp_path):
  """As of an archive that was downloaded."""
  programs.answer({STATE: [NONE, ACTIVE]})
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, GIT_DIR=str(tmp_path))
  assert (done.returncode, programs.calls, done.stderr.count("\n")) == (2, [], 1)
  assert "error: no commit to copy to the hosts: fatal: not a git repository" in done.stderr


def test_a_new_slice_gets_the_commit_that_the_run_began_with(programs, tmp_path):
  """Whatever is committed or checked out here meanwhile, in days."""
  variables = {"GIT_DIR": str(tmp_path / "git"), "GIT_WORK_TREE": str(tmp_path)}
  variables |= {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
  git = {**os.environ, **variables}
  for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
    subprocess.run(["git", *words], env=git, check=True)
  first = subprocess.run(["git", "rev-parse", "HEAD"], env=git, capture_output=True, text=True).stdout.strip()
  (tmp_path / "gcloud").write_text(f"""#!/bin/bash
case "$*" in
  *describe*) echo ACTIVE ;;
  *"{DONE}"*) exit 1 ;;
  *scp*) gzip -dc "$5" | git get-tar-commit-id >>{tmp_path}/copied ;;
  *"echo '{first} tpu' >.commit"*) echo >>{tmp_path}/installed ;;
  *"{RUN}"*) git commit -q --allow-empty -m later
    if [[ -e {tmp_path}/preempted ]]; then echo "host ended with code 0"; exit; fi
    touch {tmp_path}/preempted; echo "host ended with code 75"; exit 75 ;;
esac
""")
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, **variables)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "copied").read_text().split() == [first] * 2 and (tmp_path / "installed").read_text() == "\n\n"


def test_setup_happens_once_on_all_hosts(programs):
  programs.answer({DONE: [Answer(code=1), Answer()]})
  for _ in range(2):
    assert programs.run("tpu_pod.sh", "setup", **SETTINGS).returncode == 0
  assert kinds(programs) == ["ssh", "scp", "ssh", "ssh"]
  assert all("--worker=all" in call for call in programs.calls)
  install = programs.calls[2][-1]
  commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
  assert "uv pip install" in install and "'.[tpu]'" in install and install.endswith(f"echo '{commit} tpu' >.commit")


def test_setup_installs_the_extras_that_are_asked_for(programs):
  programs.answer({DONE: [Answer(code=1)]})
  assert programs.run("tpu_pod.sh", "setup", **SETTINGS, EXTRAS="tpu,wandb").returncode == 0
  install = programs.calls[2][-1]
  assert "'.[tpu,wandb]'" in install and install.endswith(" tpu,wandb' >.commit")


def test_a_run_on_a_host_records_the_commit_that_was_set_up(programs, tmp_path):
  """The launcher writes which one it is, and the run reads it there."""
  done = programs.run("tpu_pod.sh", "--dry-run", "setup", **SETTINGS, EXTRAS="tpu,wandb")
  written = shlex.split(done.stdout.splitlines()[-1])[-1].rpartition("; ")[2]
  subprocess.run(["bash", "-c", written], cwd=tmp_path, check=True)
  commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
  assert provenance._checkout(tmp_path) == (commit, True)


def test_setup_waits_for_a_command_and_leaves_no_code_of_an_earlier_commit(host, programs, tmp_path):
  """Its environment is made anew, and a file that the commit no longer has would count as one of it."""
  made = host("bash", "-c", "echo $$ >pid; until [[ -e end ]]; do sleep 0.05; done; [[ -e diffdis_jax/gone.py ]]")
  home = made.folder.parent
  for name in ("configs", "diffdis_jax"):
    (made.folder / name).mkdir()
  for name in ("configs/gone.py", "diffdis_jax/gone.py", "results.json", ".commit"):
    (made.folder / name).write_text("")
  with tarfile.open(home / "diffdis.tar.gz", "w:gz") as archive:
    archive.add(ROOT / "diffdis_jax/__init__.py", "diffdis_jax/__init__.py")
  for name in ("python3", "uv"):  # what installs
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
  (home / ".local").mkdir()
  (home / ".local" / "bin").symlink_to(tmp_path)
  sent = shlex.split(programs.run("tpu_pod.sh", "--dry-run", "setup", **SETTINGS).stdout.splitlines()[-1])[-1]
  shown = made.start()
  wait_for(made.folder / "pid")
  wait_for(made.folder / ".pid")
  time.sleep(0.3)
  environment = {**os.environ, "HOME": str(home), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
  script = ["bash", "-c", sent.removeprefix("--command=")]
  setup = subprocess.Popen(script, cwd=home, env=environment, stdout=subprocess.PIPE, text=True)
  assert setup.stdout.readline() == "waiting for the command that runs here\n"
  time.sleep(0.5)
  assert (made.folder / "diffdis_jax" / "gone.py").exists() and setup.poll() is None
  (made.folder / "end").touch()
  assert shown.communicate(timeout=20)[0] == "host ended with code 0\n"
  setup.communicate(timeout=20)
  assert setup.returncode == 0 and (made.folder / ".commit").read_text().endswith(" tpu\n")
  assert [path.name for path in (made.folder / "diffdis_jax").iterdir()] == ["__init__.py"]
  assert (made.folder / "results.json").exists() and not (made.folder / "configs").exists()


def test_hosts_without_an_address_outside_are_reached_by_further_flags(programs):
  programs.answer({DONE: [Answer(code=1)]})
  done = programs.run("tpu_pod.sh", "setup", **SETTINGS, SSH_FLAGS="--internal-ip --ssh-key-file=K")
  assert done.returncode == 0 and kinds(programs) == ["ssh", "scp", "ssh"]
  assert all({"--internal-ip", "--ssh-key-file=K"} <= {*call} for call in programs.calls)


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


def test_without_variables_those_of_the_last_run_are_removed(programs):
  assert run(programs, said(0))[0] == 0
  assert "; rm -f .env; export" in next(call[-1] for call in programs.calls if RUN in call[-1])


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"EXTRAS": "tpu; rm -r x"}, "EXTRAS is 'tpu; rm -r x'; it should be extras of pyproject.toml, such as tpu,wandb"),
    ({"ENV": "A-B"}, "ENV is 'A-B'; it should be names of variables, such as WANDB_API_KEY,HF_TOKEN"),
    ({"ENV": "NOT_SET_HERE"}, "ENV names NOT_SET_HERE, which is not set; export it first"),
  ],
)
def test_extras_and_variables_that_are_none_are_refused(programs, settings, message):
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, **settings)
  assert (done.returncode, programs.calls) == (2, []) and message in done.stderr


def test_run_sends_the_command_as_it_is_to_all_hosts(programs, tmp_path):
  assert run(programs, said(0, 0)) == (0, 1, "")
  call = next(call for call in programs.calls if RUN in call[-1])
  assert call[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run", "--zone=us-west4-a"]
  assert call[7:9] == ["--worker=all", "--ssh-flag=-o ServerAliveInterval=30"], "a dead host is not waited for"
  assert r"python -m diffdis_jax.train --workdir=gs://bucket/run --config.a=x\ \'y\' </dev/null" in call[-1]


def test_a_slice_that_was_taken_away_is_asked_for_again(programs):
  lost = Answer(code=255, stderr="Connection closed by remote host\n")
  states = (ACTIVE, Answer(stdout="SUSPENDING\n"), Answer(stdout="SUSPENDED\n"), NONE, ACTIVE)
  code, runs, err = run(programs, lost, said(0), states=states, restarts=0)
  assert (code, runs) == (0, 2)
  assert "preempted; starting again" in err
  later = kinds(programs)[kinds(programs).index("run") + 1 :]
  begun = [kind for kind in later if kind in ("delete", "create", "run")]
  assert begun == ["delete", "create", "run"]


def test_restarts_after_a_save_and_after_a_dead_host(programs):
  code, runs, err = run(programs, said(75, 134, 75, gcloud=1), said(1, 134, gcloud=1), said(0))
  assert (code, runs) == (0, 3)
  assert "preempted; starting again" in err and "ended with code 255; starting again (1 of 3" in err


@pytest.mark.parametrize("meant", [2, 130])
def test_bad_input_or_ctrl_c_ends_it_whatever_others_died_of(programs, meant):
  code, runs, _ = run(programs, said(134, meant, gcloud=134))
  assert (code, runs) == (meant, 1)


def test_a_host_that_says_nothing_has_not_finished(programs):
  code, runs, err = run(programs, Answer(stdout="loss 1.0\n"), said(0))
  assert (code, runs) == (0, 2)
  assert "ended with code 255" in err


@pytest.mark.parametrize("steps, runs", [([100, 100, 100], 2), ([100, 100, 200, 200], 3)])
def test_counts_restarts_since_the_last_checkpoint_in_the_bucket(programs, steps, runs):
  listed = [Answer(stdout=f"gs://bucket/run/checkpoints/{step}/commit_success.txt\n") for step in [*steps]]
  programs.answer({STATE: [ACTIVE], RUN: [said(1)], "storage ls": listed})
  done = programs.run("tpu_pod.sh", "run", "--", *TRAIN, **SETTINGS, MAX_RESTARTS="1")
  assert (done.returncode, kinds(programs).count("run")) == (1, runs)
  assert "1 restarts brought no new checkpoint" in done.stderr


@pytest.mark.parametrize(
  "subcommand, words",
  [("logs", "tail -n 100 -F diffdis/run.log"), ("stop", "kill -TERM"), ("delete", "delete run --zone=us-west4-a")],
)
def test_other_subcommands_need_only_a_name_and_a_zone(programs, subcommand, words):
  done = programs.run("tpu_pod.sh", subcommand, NAME="run", ZONE="us-west4-a", TYPE="", RUNTIME="")
  (call,) = programs.calls
  assert done.returncode == 0 and words in " ".join(call)


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


def test_a_host_shows_all_that_is_said_and_keeps_it(programs, tmp_path):
  home = tmp_path / "home"
  home.mkdir()
  host = Host(programs, home, "bash", "-c", 'echo "it\'s $0" >&2; seq 3; exit 75')
  (host.folder / "run.log").write_text("of an earlier attempt\n")
  shown = host.start()
  out, _ = shown.communicate(timeout=20)
  assert (shown.returncode, out.splitlines()) == (75, ["it's bash", "1", "2", "3", "host ended with code 75"])
  assert (host.folder / "run.log").read_text().startswith("of an earlier attempt\nit's bash\n1\n")
  assert not (host.folder / ".pid").exists()


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


def test_a_connection_made_again_waits_for_the_same_attempt_and_says_how_it_ended(programs, tmp_path):
  home = tmp_path / "home"
  home.mkdir()
  script = "echo started >>attempts; while [[ ! -e end ]]; do sleep 0.05; done; exit 75"
  host = Host(programs, home, "bash", "-c", script)
  first = host.start()
  wait_for(host.folder / "attempts")
  first.stdout.close()
  again = host.start()
  (host.folder / "end").touch()
  out, _ = again.communicate(timeout=20)
  first.wait(timeout=20)
  assert (again.returncode, out) == (75, "waiting for the command that runs here\nhost ended with code 75\n")
  assert (host.folder / "attempts").read_text() == "started\n"


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


@pytest.mark.parametrize("how", ["", "setsid "])
def test_what_a_command_leaves_behind_does_not_block_the_next_attempt(host, how):
  """It is killed, unless it has left the command's group."""
  made = host("bash", "-c", f"{how}sleep 300 & echo $! >>children; sleep 0.3; exit 75")
  try:
    for _ in range(2):
      shown = made.start()
      assert shown.communicate(timeout=20)[0] == "host ended with code 75\n"
      made.attempt()
  finally:
    shown.kill()
    alive = [child for child in (made.folder / "children").read_text().split() if is_alive(child)]
    for child in alive:
      os.kill(int(child), signal.SIGKILL)
  assert len(alive) == (2 if how else 0)


def test_a_command_whose_shell_has_died_is_waited_for(host):
  made = host("bash", "-c", "echo $$ >pid; echo started >>attempts; until [[ -e end ]]; do sleep 0.05; done")
  first = made.start()
  wait_for(made.folder / "attempts")
  wait_for(made.folder / ".pid")
  time.sleep(0.3)
  first.kill()
  first.stdout.close()  # which its tail has too
  first.wait()
  made.attempt()
  second = made.start()
  time.sleep(1.5)
  assert (made.folder / "attempts").read_text() == "started\n"
  (made.folder / "end").touch()
  out, _ = second.communicate(timeout=20)
  assert out == "waiting for the command that runs here\nhost ended with code 0\n"
  assert (made.folder / "attempts").read_text() == "started\n" * 2


def test_stop_asks_the_command_to_save(host):
  made = host("bash", "-c", "trap 'echo saved >saved; exit 75' TERM; echo $$ >pid; while true; do sleep 0.05; done")
  shown = made.start()
  wait_for(made.folder / "pid")
  wait_for(made.folder / ".pid")
  time.sleep(0.3)
  done = made.stop()
  assert (done.returncode, done.stderr) == (0, "")
  assert shown.communicate(timeout=20)[0] == "host ended with code 75\n" and (made.folder / "saved").exists()


@pytest.mark.parametrize("kept", ["{pid} 1", "{pid}", "", None])
def test_stop_leaves_whoever_has_the_number_of_a_command_that_is_gone(host, kept):
  """A host that went down keeps .pid; what begins later gets the number again."""
  made = host("true")
  other = subprocess.Popen(["sleep", "300"])
  try:
    if kept is not None:
      (made.folder / ".pid").write_text(kept.format(pid=other.pid) + "\n")
    done = made.stop()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    time.sleep(0.2)
    assert other.poll() is None
    assert made.start().communicate(timeout=20)[0] == "host ended with code 0\n"
    assert not (made.folder / ".pid").exists() and other.poll() is None
  finally:
    other.kill()
    other.wait()


def test_stop_where_nothing_was_set_up_does_nothing(host):
  made = host("true")
  made.folder.rmdir()
  done = made.stop()
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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


def test_a_list_is_done_one_after_another_and_one_that_fails_is_told(programs):
  programs.answer({STATE: [ACTIVE], RUN: [said(0), said(2, gcloud=1), said(0)]})
  done = programs.run("tpu_pod.sh", "run", "--each=9-11", "--", "ablate", "run", **SETTINGS)
  assert done.returncode == 2 and "number 10 ended with code 2" in done.stderr
  commands = [" ".join(call) for call in programs.calls if RUN in " ".join(call)]
  assert len(commands) == 3
  assert all(f"ablate run --only={number}" in text for number, text in zip((9, 10, 11), commands))


@pytest.mark.parametrize("each", ["--each=3", "--each=5-3", "--each=a-b"])
def test_no_such_list(programs, each):
  done = programs.run("tpu_pod.sh", "run", each, "--", "ablate", "run", **SETTINGS)
  assert (done.returncode, programs.calls, done.stderr.count("\n")) == (2, [], 1)
  assert "should be --each=FIRST-LAST" in done.stderr
