from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from diffdis_jax.common import buckets
from diffdis_jax.run import writers


def read_lines(path):
  def refuse(token):
    raise AssertionError(f"{token} is not JSON")

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_json_object_a_line(tmp_path):
  writer = writers.open_writer(tmp_path, start_step=0, is_writer=True)
  writer.scalars(1, {"loss": jnp.bfloat16(0.5), "count": np.int32(3), "bad": float("nan"), "worse": jnp.inf})
  writer.scalars(2, {"loss": jnp.float32(0.25)})
  writer.close()
  assert read_lines(tmp_path / "metrics.jsonl") == [
    {"step": 1, "loss": 0.5, "count": 3, "bad": None, "worse": None},
    {"step": 2, "loss": 0.25},
  ]


def test_resume_drops_the_steps_beyond_it_and_a_line_cut_off(tmp_path):
  writer = writers.open_writer(tmp_path, start_step=0, is_writer=True)
  for step in (1, 2, 3, 4):
    writer.scalars(step, {"loss": step / 2})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "lo')
  writers.open_writer(tmp_path, start_step=2, is_writer=True).scalars(3, {"loss": 9.0})
  assert read_lines(tmp_path / "metrics.jsonl") == [
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": 1.0},
    {"step": 3, "loss": 9.0},
  ]


def test_image_is_a_png_whole_or_not_at_all(tmp_path):
  image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  writers.open_writer(tmp_path, start_step=0, is_writer=True).image(7, "samples", image)
  assert [path.name for path in (tmp_path / "samples").iterdir()] == ["samples_00000007.png"]
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "samples_00000007.png")), image)


def test_an_evaluation_that_is_done_again_has_its_lines_once(tmp_path):
  """That of the step from which the run resumes, which was stopped in the middle of it."""
  writers.open_writer(tmp_path, start_step=0, is_writer=True).scalars(2, {"loss": 1.0})
  for _ in range(2):
    writer = writers.open_writer(tmp_path, start_step=2, is_writer=True, evaluated=False)
    writer.scalars(2, {"test/acc1": 0.5})
    writer.scalars(3, {"loss": 0.5})  # and killed here
  expected = [{"step": 2, "loss": 1.0}, {"step": 2, "test/acc1": 0.5}, {"step": 3, "loss": 0.5}]
  assert read_lines(tmp_path / "metrics.jsonl") == expected
  writers.open_writer(tmp_path, start_step=2, is_writer=True)
  assert read_lines(tmp_path / "metrics.jsonl") == expected[:2]


def test_only_the_writer_writes(tmp_path):
  writer = writers.open_writer(tmp_path, start_step=0, is_writer=False)
  writer.scalars(1, {"loss": 1.0})
  writer.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
  writer.flush()
  writer.close()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_scalars_and_images_of_two_starts(tmp_path):
  image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  for step in (5, 6):
    writer = writers.open_writer(tmp_path, start_step=step - 1, is_writer=True)
    writer.scalars(step, {"loss": jnp.bfloat16(step / 2), "bad": float("nan")})
    writer.image(step, "samples", image)
    if step == 6:  # the other was killed
      writer.close()
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  events = EventAccumulator(str(tmp_path)).Reload()
  assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 2.5), (6, 3.0)]
  assert math.isnan(events.Scalars("bad")[0].value)
  found = events.Images("samples")[-1]
  assert (found.step, found.height, found.width) == (6, 4, 6)
  with Image.open(io.BytesIO(found.encoded_image_string)) as decoded:
    np.testing.assert_array_equal(np.asarray(decoded), image)


@pytest.mark.filterwarnings("default")
def test_pictures_that_a_bucket_has_are_not_copied_there_again(tmp_path, monkeypatch):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  monkeypatch.setattr(writers, "MOST_EVENTS", 4000)
  copied: list[int] = []  # bytes of TensorBoard's files, at each copy

  class Bucket:
    def put_file(self, file, to):
      copied[-1] += os.path.getsize(file) if "tfevents" in to else 0

  monkeypatch.setattr(buckets, "_system", Bucket)
  mirror = buckets.Mirror(epath.Path("gs://bucket/run"))
  writer = writers.Writer(epath.Path(tmp_path), mirror)
  noise = np.random.default_rng(0)
  for step in range(1, 31):
    writer.image(step, "samples", noise.integers(0, 256, (16, 16, 3), np.uint8))
    copied.append(0)
    writer.flush()
  assert 0 < max(copied) < 6000
  events = EventAccumulator(str(mirror.folder), size_guidance={"images": 0}).Reload()
  assert [event.step for event in events.Images("samples")] == [*range(1, 31)]
  mirror.close()


def test_tensorflow_is_never_loaded(tmp_path):
  (tmp_path / "tensorflow.py").write_text("raise AssertionError('loaded')\n")
  code = (
    "import sys; from diffdis_jax.run import writers; writer = writers.open_writer(sys.argv[1], start_step=0,"
    " is_writer=True); writer.scalars(1, {'loss': 1.0}); writer.close(); sys.exit('tensorflow' in sys.modules)"
  )
  path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
  environment = {**os.environ, "PYTHONPATH": path}
  assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment).returncode == 0


class Recorder:
  """A tracker's module, run and picture."""

  def __init__(self, found):
    self.found, self.Image = found, np.shape

  def init(self, **how):
    self.found.append(how)
    return self

  def define_metric(self, *_, **__): ...

  def log(self, values, **step):
    self.found.append(values | step)

  def finish(self):
    self.found.append("closed")


def test_a_tracker_gets_the_same_numbers_and_pictures(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", Recorder(found := []))
  for _ in range(2):  # the same run there
    track = lambda: writers.Tracker(tmp_path, {"seed": 3})
    writer = writers.open_writer(tmp_path, start_step=0, is_writer=True, open_tracker=track)
    writer.scalars(1, {"loss": jnp.bfloat16(0.5), "count": np.int32(3), "bad": float("nan")})
    writer.image(1, "samples", np.zeros((2, 4, 3), np.uint8))
    writer.close()
  assert found[1:4] == [{"loss": 0.5, "count": 3, "step": 1}, {"samples": (2, 4, 3), "step": 1}, "closed"]
  assert found[4:] == found[:4] and found[0]["config"] == {"seed": 3}
  assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": found[0]["id"]}


def test_a_damaged_line_is_not_dropped_in_silence(tmp_path, caplog):
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"step": 1, "loss": 1.0}\n{"stfp": 2, "loss": 1.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
  writers.open_writer(tmp_path, start_step=3, is_writer=True).close()
  assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 3]
  assert caplog.messages == ["metrics.jsonl has 1 lines that cannot be read; they are left out"]
