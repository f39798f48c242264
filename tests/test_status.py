"""diffdis status, as a user types it."""

from __future__ import annotations

import json
import os

import pytest

from tests.command_runs import call
from tests.report import written_run

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def status(*arguments: str):
  done = call("status", ENVIRONMENT, *arguments)
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
  return str(written_run.write(tmp_path_factory.mktemp("status") / "run"))


def test_how_a_run_stands(run):
  code, out, errors = status(run)
  assert (code, errors) == (0, "")
  state, step, checkpoint, cost = out.splitlines()
  assert state == "stopped" and checkpoint == "last checkpoint: step 300"
  assert step.startswith("step 300 of 400, ") and step.endswith(" ago") and "left" not in step
  assert " hours of " in cost and "; starts: " in cost


def test_the_same_as_json(run):
  code, out, _ = status(f"{run}/", "--json")
  found = json.loads(out)
  assert code == 0
  assert (found["state"], found["step"], found["num_steps"], found["checkpoint"]) == (
    "stopped",
    300,
    400,
    300,
  )
  assert found["starts"] >= 1 and found["steps_per_sec"] > 0 and found["age"] >= 0


def test_the_pace_is_the_last_that_is_known(tmp_path):
  """A report of the first step after a start knows none."""
  run = tmp_path / "run"
  written_run.write(run)
  (run / "metrics.jsonl").write_text(written_run.line(20) + json.dumps({"step": 21, "steps_per_sec": None}) + "\n")
  found = json.loads(status(str(run), "--json")[1])
  assert (found["step"], found["steps_per_sec"], found["seconds_left"]) == (21, 5.0, 379 / 5.0)


def test_a_run_in_one_file_stands_at_the_step_of_its_weights():
  assert status("shapes") == (
    0,
    "finished\nstep 3,000 of 3,000\nlast checkpoint: step 3,000\nno device-hours known; starts: 0\n",
    "",
  )


@pytest.mark.parametrize(
  "arguments, message", [([], "write status RUN"), (["a", "b"], "write status RUN"), (["nowhere"], "nowhere")]
)
def test_no_run_is_one_line(tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  code, out, errors = status(*arguments)
  assert code == 2 and not out and errors.count("\n") == 1 and message in errors


def test_a_terminal_that_knows_ascii_alone_gets_question_marks(tmp_path):
  run = tmp_path / "run"
  written_run.write(run)
  with (run / "history.jsonl").open("a") as file:
    file.write(json.dumps({"event": "end", "time": 1.0, "why": "failed", "message": "no folder größer"}) + "\n")
  done = call("status", {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "LANG": "C"}, str(run))
  assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("failed: no folder gr??er\n")
