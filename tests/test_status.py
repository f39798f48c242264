"""Test the command diffdis status."""

from __future__ import annotations

import os

import pytest

from tests.command_runs import call
from tests.report import written_run

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def status(*arguments: str):
  done = call("status", ENVIRONMENT, *arguments)
  return done.returncode, done.stdout, done.stderr


def test_the_status_of_a_run_in_words(tmp_path):
  run = str(written_run.write(tmp_path / "run"))
  code, out, errors = status(run)
  assert (code, errors) == (0, "")
  state, step, checkpoint, cost = out.splitlines()
  assert state == "stopped" and checkpoint == "last checkpoint: step 300"
  assert step.startswith("step 300 of 400, ") and step.endswith(" ago") and "left" not in step
  assert " hours of " in cost and "; starts: " in cost
  assert " steps/s" in step and int(cost.rpartition(" ")[2]) >= 1


def test_the_status_of_a_run_in_one_file_has_the_step_of_its_weights():
  assert status("shapes") == (
    0,
    "finished\nstep 3,000 of 3,000\nlast checkpoint: step 3,000\nno device-hours known; starts: 0\n",
    "",
  )


@pytest.mark.parametrize("arguments, message", [([], "write status RUN"), (["nowhere"], "nowhere")])
def test_a_missing_run_is_refused_in_one_line(tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  code, out, errors = status(*arguments)
  assert code == 2 and not out and errors.count("\n") == 1 and message in errors
