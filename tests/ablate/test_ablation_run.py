"""Test the order of the runs, and what happens if a run fails, is stopped, or belongs to another process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import pytest

from diffdis_jax import config as run_config
from diffdis_jax.ablate import plan as planning
from diffdis_jax.ablate import run as running
from diffdis_jax.ablate import tables
from diffdis_jax.ablate.run import Folder, State, seconds_per_step
from diffdis_jax.common import signals
from diffdis_jax.errors import Interrupted, Preempted
from diffdis_jax.run import lock
from tests import tiny
from tests.ablate import synthetic
from tests.ablate.synthetic import make_plan
from tests.command_runs import ROOT
from tests.interrupting import Terminal, is_alive, not_ignored


@pytest.fixture
def plan():
  """Plan an autoencoder and two rows, with one seed."""
  return make_plan(names=["4"], seeds=(0,))


class Recorder:
  """Stand in for training and measuring: record the calls, and return the state of each run."""

  def __init__(self, folder: Folder, monkeypatch: pytest.MonkeyPatch):
    self.folder, self.trained, self.measured = folder, [], []
    monkeypatch.setattr(folder, "state", self.state)

  def state(self, run):
    is_trained = self.folder.workdir(run) in self.trained
    return State(step=8 * is_trained, num_steps=8, measured=not run.evals or run.name in self.measured, seconds=None)

  def train(self, record, path):
    assert isinstance(record, run_config.Run)
    self.trained.append(path)

  def measure(self, run, path, out):
    assert self.folder.workdir(run) == path and self.folder.results(run) == out
    with pytest.raises(lock.InUse):
      lock.Lock(path).__enter__()
    self.measured.append(run.name)


@pytest.fixture
def recorder(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "ENDING", 0.0)
  return Recorder(Folder(tmp_path), monkeypatch)


def test_the_autoencoder_is_trained_first_and_once(plan, recorder):
  first, off, on = plan.runs
  for run in (on, off, on):
    running.run(run, recorder.folder, train=recorder.train, measure=recorder.measure)
  assert recorder.trained == [recorder.folder.workdir(run) for run in (first, on, off)]
  assert recorder.measured == [on.name, off.name]


def test_a_chain_of_runs_is_trained_from_its_first(recorder):
  """The autoencoder is trained first, then generation, then both; only the last is a row and is measured."""
  fields = synthetic.base().to_dict()
  start = tables.Row(label="generation", changes={"objectives": ("generation",)}, measured=False)
  table = tables.Table(name="t", title="t", rows=(tables.Row(label="then both", changes={}, start=start),), base=None)
  autoencoder = tiny.get_config("autoencoder").to_dict()
  plan = planning.make(fields, autoencoder, [table], (7,), own_starts=True)
  assert [run.name.partition("-seed_7")[0] for run in plan.runs] == ["autoencoder", "generation", "then_both"]
  assert {run.config["seed"] for run in plan.runs} == {7}
  running.run(plan.runs[2], recorder.folder, train=recorder.train, measure=recorder.measure)
  assert recorder.trained == [recorder.folder.workdir(run) for run in plan.runs] and recorder.measured == [
    plan.runs[2].name
  ]


def test_a_run_of_another_process_is_waited_for(plan, recorder, monkeypatch):
  """Another process trains the run, which is not trained again after that process has ended."""
  monkeypatch.setattr(running, "PATIENCE", 0.01)
  first, *_ = plan.runs
  path, waits = recorder.folder.workdir(first), []

  def train(config, path):
    waits.append(path)
    if len(waits) == 3:
      recorder.trained.append(path)  # by the other process
    raise lock.InUse("in use by process 1 on another; wait for it")

  running.run(first, recorder.folder, train=train, measure=recorder.measure)
  assert waits == [path] * 3 and not recorder.measured


def script(lines: dict[int, str]):
  return lambda number: [sys.executable, "-IS", "-c", lines.get(number, "pass")]


def test_a_run_that_fails_is_reported_and_the_others_go_on(plan, tmp_path, caplog):
  folder = Folder(tmp_path)
  failing = "import sys; sys.stderr.write('step 1\\nerror: no such data\\nbye\\n'); sys.exit(2)"
  code = running.run_all(plan, folder, script({1: failing, 2: f"open({str(tmp_path / 'other')!r}, 'w')"}))
  assert code == 2 and (tmp_path / "other").exists()
  assert folder.log(plan.runs[1]).read_text() == "step 1\nerror: no such data\nbye\n"
  assert (
    f"run 1, {plan.runs[1].name}: failed with code 2: no such data; log in {folder.log(plan.runs[1])}" in caplog.text
  )
  assert "1 of 3 runs failed" in caplog.text
  assert running.run_all(plan, folder, script({1: failing, 2: "raise SystemExit(1)"})) == 1
  assert folder.log(plan.runs[1]).read_text().count("no such data") == 2


def test_an_autoencoder_that_no_row_needs_is_not_trained(plan, tmp_path):
  """No row needs it once all its rows have results, even if its workdir is missing."""
  folder, begun = Folder(tmp_path), tmp_path / "begun"
  synthetic.write(folder, plan.runs[1], {})
  lines = {number: f"open({str(begun)!r}, 'a').write('{number} ')" for number in range(3)}
  assert running.run_all(plan, folder, script(lines)) == 0 and begun.read_text() == "0 2 "
  assert running.lines(plan, folder)[-1].startswith("3 runs, 1 finished")
  synthetic.write(folder, plan.runs[2], {})
  assert running.run_all(plan, folder, script(lines)) == 0 and begun.read_text() == "0 2 "
  assert running.lines(plan, folder)[-1] == "3 runs, 3 finished"


def test_sigterm_is_passed_to_the_run_which_saves(plan, tmp_path):
  begun, saved = tmp_path / "begun", tmp_path / "saved"
  waits = (
    "import pathlib, signal, sys, time\n"
    f"def save(*_):\n  pathlib.Path({str(saved)!r}).touch(); sys.exit(75)\n"
    f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(begun)!r}).touch()\n"
    "while True:\n  time.sleep(0.01)"  # in short steps: Python handles a signal between them
  )

  def stop():
    while not begun.exists():
      threading.Event().wait(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  def end(number):
    raise signals.Terminated

  threading.Thread(target=stop).start()
  with signals.handled(end), pytest.raises(Preempted):
    running.run_all(plan, Folder(tmp_path / "out"), script({0: waits, 1: "assert False"}))
  assert saved.exists()
  assert not Folder(tmp_path / "out").log(plan.runs[1]).exists()


def test_ctrl_c_ends_the_run_and_no_other_starts(plan, tmp_path, caplog):
  begun, next_one = tmp_path / "begun", tmp_path / "next"
  waits = f"import time; open({str(begun)!r}, 'w')\nwhile True:\n  time.sleep(0.01)"
  lines = {1: waits, 2: f"open({str(next_one)!r}, 'w')"}
  caplog.set_level("INFO")

  def interrupt():
    while not begun.exists():
      threading.Event().wait(0.01)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt).start()
  begin = time.monotonic()
  with not_ignored(), pytest.raises(Interrupted):
    running.run_all(plan, Folder(tmp_path / "out"), script(lines))
  assert time.monotonic() - begin < 30 and not next_one.exists()
  assert "run 1 of 0 to 2: " in caplog.text and "run 2 of 0 to 2: " not in caplog.text


# The program of a run that saves once, although both the terminal's Ctrl-C and its parent's SIGTERM reach it.
SAVING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  time.sleep(0.5)
  (folder / f"saved.{os.getpid()}").touch()
  os._exit(130)
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, save)
(folder / f"begun.{os.getpid()}").touch()
while True:
  time.sleep(1)
"""
ALL = """
import pathlib, sys
from absl import flags
from diffdis_jax.common import cli
from diffdis_jax.ablate import run
from tests.ablate.synthetic import make_plan

FOLDER = flags.DEFINE_string("folder", "", "")

def main(_):
  folder, plan = pathlib.Path(FOLDER.value), make_plan(names=["4"], seeds=(0,))
  command = lambda number: [sys.executable, "-IS", str(folder / "saving.py"), str(folder)]
  sys.exit(run.run_all(plan, run.Folder(folder / "out"), command))

if __name__ == "__main__":
  cli.run(main)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_lets_the_run_save(tmp_path):
  (tmp_path / "saving.py").write_text(SAVING)
  (tmp_path / "all.py").write_text(ALL)
  command = [sys.executable, str(tmp_path / "all.py"), f"--folder={tmp_path}", "--quiet"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  with Terminal(command, environment, tmp_path / "stderr") as terminal:
    terminal.wait_until(lambda: len([*tmp_path.glob("begun.*")]) == 1)
    terminal.ctrl_c()
    assert terminal.end(seconds=20) == 130
    (line,) = terminal.stderr.splitlines()
    assert "a second Ctrl-C ends it at once" in line
  assert len([*tmp_path.glob("saved.*")]) == 1
  assert not any(is_alive(path.suffix[1:]) for path in tmp_path.glob("begun.*"))


@pytest.mark.parametrize("code, cause", [(75, Preempted), (130, Interrupted)])
def test_a_run_that_was_stopped_ends_the_others(plan, tmp_path, code, cause):
  with pytest.raises(Preempted) as error:
    running.run_all(plan, Folder(tmp_path), script({0: f"raise SystemExit({code})", 1: "assert False"}))
  assert error.type is cause


def test_the_seconds_of_a_step_are_read_from_the_log(tmp_path):
  """4 steps at 2 per second and 4 at 4 per second take 0.375 s each. Other lines are skipped, and one cut off too."""
  assert seconds_per_step(str(tmp_path)) is None
  lines = [{"step": 4, "steps_per_sec": 2.0}, {"step": 4, "test/acc1": 1.0}, {"step": 8, "steps_per_sec": 4.0}]
  lines.append({"step": 9, "steps_per_sec": None})
  text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "steps_p'
  (tmp_path / "metrics.jsonl").write_text(text)
  assert seconds_per_step(str(tmp_path)) == 0.375
