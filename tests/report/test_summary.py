from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.report import read
from tests.report import written_run
from tests.report.written_run import DAY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return read.read(written_run.write(tmp_path_factory.mktemp("summary") / "run"), "run")


def test_a_workdir_is_read(run):
  assert run.step == 300 and run.curves["loss"].steps[-1] == 300
  assert [step for step, _ in run.grids["samples"]] == [100, 200, 300]
  assert run.checkpoints == {200: {"test/acc1": 0.25}, 300: {}}, "not the one that was never committed"
  (result,) = run.results
  assert result[:3] == ("results.json", "zero_shot", "birds/val") and result.record["metrics"] == {"acc1": 0.75}
  assert not run.alive


@pytest.mark.parametrize(
  "events, alive, step, expected",
  [
    ([{"event": "start"}, {"event": "end", "why": "finished"}], False, 400, "finished"),
    ([{"event": "end", "why": "failed", "message": "too hot"}], True, 100, "failed"),
    ([{"event": "start"}], True, 100, "running"),
    ([{"event": "start"}], False, 100, "killed"),
    ([], True, 100, "running"),
    ([], False, 400, "finished"),
    ([], False, 100, "unfinished"),
  ],
)
def test_how_a_run_stands(run, events, alive, step, expected):
  curve = dataclasses.replace(run.curves["loss"], steps=np.array([step]), values=np.array([1.0]))
  status = read.status(dataclasses.replace(run, events=events, alive=alive, curves={"loss": curve}))
  assert status == {"state": expected, "message": "too hot" if expected == "failed" else ""}


def test_a_run_that_was_started_again_runs_before_its_first_step(tmp_path):
  """The lock shows that it runs."""
  path = tmp_path / "run"
  written_run.write(path)
  state = lambda: read.status(read.read(str(path), "run"))["state"]
  (path / "lock.json").write_text(json.dumps({"time": time.time() - 10}))
  assert state() == "running"
  event = {"event": "end", "time": time.time() - 5.0, "why": "stopped"}
  (path / "history.jsonl").write_text(json.dumps(event))
  assert state() == "stopped", "by the process that still saves"


def test_starts_and_what_they_cost(run):
  starts = read.starts(run, now=DAY + 1000)
  assert [start["seconds"] for start in starts] == [100.0, 200.0]
  assert [start["how"] for start in starts] == ["killed", "stopped"]
  assert [start["repeated"] for start in starts] == [10, 0]  # from step 50 back to step 40
  cost = read.cost(run, starts)
  assert cost["device_hours"] == {"TPU v4": pytest.approx(2 * 300 / 3600)}
  assert cost["seconds"] == 300
  assert cost["seconds_in_steps"] == pytest.approx(290 / 5)  # all but the first ten steps, at five a second
  assert cost["images"] == 300 * 16


def test_a_run_that_goes_on_costs_until_now(run):
  run = dataclasses.replace(run, events=run.events[:2], alive=True)
  starts = read.starts(run, now=DAY + 1000)
  assert (starts[-1]["seconds"], starts[-1]["how"]) == (500.0, "running")
  killed = read.starts(dataclasses.replace(run, alive=False, written=DAY + 600), now=DAY + 1000)
  assert (killed[-1]["seconds"], killed[-1]["how"]) == (100.0, "killed")


def test_fields_that_differ_from_the_defaults(run):
  differing = read.differing(run)
  assert {"num_steps", "batch_size", "data.path"} <= {*differing} and "seed" not in differing
  fields = read.fields(run)
  assert json.loads(fields["num_steps"]) == 400 and json.loads(fields["optim.groups"])[0][1] == "frozen"


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match="no config.json in"):
    read.read(str(tmp_path), "x")
