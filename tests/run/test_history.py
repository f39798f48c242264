from __future__ import annotations

import json

import pytest
from etils import epath

from diffdis_jax.errors import Preempted, UserError
from diffdis_jax.run import history


def record(folder, *, step=0, error=None, facts=None):
  with history.recorded(folder, step=step, is_writer=True, facts=facts or {}):
    if error:
      raise error


def test_each_start_says_where_the_run_was_and_each_end_why(tmp_path):
  record(tmp_path, facts={"devices": 8})
  (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"step": 6, "loss": 2.0}\n{"step": 7, "lo')
  written = (tmp_path / "metrics.jsonl").stat().st_mtime
  for error in (Preempted(), UserError("too hot"), ZeroDivisionError("a bug")):
    with pytest.raises(type(error)):
      record(tmp_path, step=5, error=error)
  events = history.read(tmp_path)
  assert [event["event"] for event in events] == ["start", "end"] * 4
  first, second = events[0], events[2]
  assert (first["step"], first["devices"]) == (0, 8) and "reached" not in first
  assert (second["step"], second["reached"]) == (5, 6) and second["until"] == pytest.approx(written, abs=1.0)
  assert [event["why"] for event in events[1::2]] == ["finished", "stopped", "failed", "failed"]
  assert [event.get("message") for event in events[1::2]] == [None, None, "too hot", "ZeroDivisionError: a bug"]
  assert events[-1]["time"] >= first["time"] > 1.7e9


def test_a_line_that_was_cut_off_does_not_swallow_the_next_one(tmp_path):
  record(tmp_path)
  with (tmp_path / history.FILE).open("a") as file:
    file.write('{"event": "start", "ti')
  record(tmp_path, step=3)
  events = history.read(tmp_path)
  assert [(event["event"], event.get("step")) for event in events] == [
    ("start", 0),
    ("end", None),
    ("start", 3),
    ("end", None),
  ]


def test_only_the_writer_writes_and_no_file_is_no_history(tmp_path):
  with history.recorded(tmp_path, step=0, is_writer=False, facts={}):
    pass
  assert list(tmp_path.iterdir()) == [] and history.read(tmp_path) == []


@pytest.mark.parametrize("line", ["", "{", "3", "[]", '{"step": 1'])
def test_what_is_no_object_is_an_empty_one(line):
  assert history.parse(line) == {}
  assert history.parse(json.dumps({"step": 1})) == {"step": 1}


def test_a_disk_that_is_full_at_the_end_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
  append = history._append

  def full(path, line):
    if line["event"] == "end":
      raise OSError(28, "No space left on device")
    append(path, line)

  monkeypatch.setattr(history, "_append", full)
  with pytest.raises(Preempted):
    record(tmp_path, error=Preempted())


def test_bytes_that_are_no_text_cost_their_line_alone(tmp_path):
  record(tmp_path)
  with (tmp_path / history.FILE).open("ab") as file:
    file.write(b"\xff\xfe\x00\n")
  record(tmp_path, step=3)
  assert [event.get("step") for event in history.read(tmp_path)] == [0, None, 3, None]
  metrics = epath.Path(tmp_path) / "metrics.jsonl"
  metrics.write_bytes(b'{"step": 4}\n\xff\xff\n')
  assert history.last_line(metrics) == {"step": 4}


@pytest.mark.parametrize("step", ['"x"', "[1]", "null", "true"])
def test_a_step_that_is_no_number_is_no_last_line(tmp_path, step):
  (tmp_path / "metrics.jsonl").write_text(f'{{"step": 3, "loss": 1}}\n{{"step": {step}, "loss": 1}}\n[1]\n')
  assert history.last_line(epath.Path(tmp_path) / "metrics.jsonl") == {"step": 3, "loss": 1}
