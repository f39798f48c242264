from __future__ import annotations

import io
import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffdis_jax.errors import UserError
from diffdis_jax.run import writers


def read_lines(path):
  def refuse(token):
    raise AssertionError(f"{token} is not JSON")

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_later_steps_and_a_line_that_is_cut_off(tmp_path):
  writer = writers.open_writer(tmp_path, start_step=0, is_writer=True)
  writer.scalars(1, {"loss": jnp.bfloat16(0.5), "count": np.int32(3), "bad": float("nan"), "worse": jnp.inf})
  for step in (2, 3, 4):
    writer.scalars(step, {"loss": step / 2})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "lo')
  writers.open_writer(tmp_path, start_step=2, is_writer=True).scalars(3, {"loss": 9.0})
  assert read_lines(tmp_path / "metrics.jsonl") == [
    {"step": 1, "loss": 0.5, "count": 3, "bad": None, "worse": None},
    {"step": 2, "loss": 1.0},
    {"step": 3, "loss": 9.0},
  ]


def test_a_repeated_evaluation_is_logged_once(tmp_path):
  """The run was stopped during an evaluation, and resumes from the step of the evaluation."""
  writers.open_writer(tmp_path, start_step=0, is_writer=True).scalars(2, {"loss": 1.0})
  for _ in range(2):
    writer = writers.open_writer(tmp_path, start_step=2, is_writer=True, evaluated=False)
    writer.scalars(2, {"test/acc1": 0.5})
    writer.scalars(3, {"loss": 0.5})  # the run is killed here
  expected = [{"step": 2, "loss": 1.0}, {"step": 2, "test/acc1": 0.5}, {"step": 3, "loss": 0.5}]
  assert read_lines(tmp_path / "metrics.jsonl") == expected
  writers.open_writer(tmp_path, start_step=2, is_writer=True)
  assert read_lines(tmp_path / "metrics.jsonl") == expected[:2]


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_scalars_and_images_of_two_starts(tmp_path):
  image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  for step in (5, 6):
    writer = writers.open_writer(tmp_path, start_step=step - 1, is_writer=True)
    writer.scalars(step, {"loss": jnp.bfloat16(step / 2), "bad": float("nan")})
    writer.image(step, "samples", image)
    if step == 6:  # the other process was killed
      writer.close()
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "samples_00000006.png")), image)
  events = EventAccumulator(str(tmp_path)).Reload()
  assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 2.5), (6, 3.0)]
  assert math.isnan(events.Scalars("bad")[0].value)
  picture = events.Images("samples")[-1]
  assert (picture.step, picture.height, picture.width) == (6, 4, 6)
  with Image.open(io.BytesIO(picture.encoded_image_string)) as decoded:
    np.testing.assert_array_equal(np.asarray(decoded), image)


class Recorder:
  """Stand in for a tracker's module and its run, and record their calls."""

  def __init__(self, calls):
    self.calls, self.Image = calls, np.shape

  def init(self, **how):
    self.calls.append(how)
    return self

  def define_metric(self, *_, **__): ...

  def log(self, values, **step):
    self.calls.append(values | step)

  def finish(self):
    self.calls.append("closed")


def test_a_tracker_gets_the_same_numbers_and_pictures(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", Recorder(calls := []))
  for _ in range(2):  # the second turn continues the same tracked run
    track = lambda: writers.Tracker(tmp_path, {"seed": 3})
    writer = writers.open_writer(tmp_path, start_step=0, is_writer=True, open_tracker=track)
    writer.scalars(1, {"loss": jnp.bfloat16(0.5), "count": np.int32(3), "bad": float("nan")})
    writer.image(1, "samples", np.zeros((2, 4, 3), np.uint8))
    writer.close()
  assert calls[1:4] == [{"loss": 0.5, "count": 3, "step": 1}, {"samples": (2, 4, 3), "step": 1}, "closed"]
  assert calls[4:] == calls[:4] and calls[0]["config"] == {"seed": 3}
  assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": calls[0]["id"]}


def test_a_damaged_line_is_dropped_with_a_warning(tmp_path, caplog):
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"step": 1, "loss": 1.0}\n{"stfp": 2, "loss": 1.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
  writers.open_writer(tmp_path, start_step=3, is_writer=True).close()
  assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 3]
  assert caplog.messages == ["metrics.jsonl has 1 lines that cannot be read; they are left out"]


class SignedOut(types.SimpleNamespace):
  """Stand in for wandb on a machine where nobody has signed in."""

  class Error(Exception):
    pass

  def login(self, *, verify: bool):
    assert not verify
    raise self.Error("No API key configured. Use `wandb login` to log in.")


def test_a_run_does_not_start_without_the_trackers_package_or_account(monkeypatch):
  monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"--tracker=wandb needs the package wandb, .*; pip install -e '\.\[wandb\]'"):
    writers.check_tracker("wandb")
  monkeypatch.setitem(sys.modules, "wandb", SignedOut())
  monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: object())
  monkeypatch.delenv("WANDB_MODE", raising=False)
  with pytest.raises(UserError, match="--tracker=wandb: No API key .* With WANDB_MODE=offline the numbers stay here"):
    writers.check_tracker("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  for kind in ("wandb", ""):
    writers.check_tracker(kind)
