"""Writers of a run's reports: metrics.jsonl, TensorBoard, a tracker, sample images, and the progress line.

Only one process writes; on the others a Writer does nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from diffdis_jax.common import buckets, files, progress
from diffdis_jax.errors import FULL_DISK, may_pass
from diffdis_jax.run import history
from diffdis_jax.run.trackers import Tracker

MOST_EVENTS = 2**23  # bytes of a file of TensorBoard's that is copied to a bucket whenever it has grown


class Writer:
  """Writes scalars and images of a run to files, to TensorBoard and to a tracker.

  Args:
    path: the run's folder.
    mirror: where files that are appended to are kept, if that folder is in a bucket.
    tracker: that gets the same.
  """

  def __init__(self, path: epath.Path, mirror: buckets.Mirror | None = None, tracker: Tracker | None = None) -> None:
    self._path, self._mirror, self._tracker = path, mirror, tracker
    self._appended = mirror.folder if mirror else pathlib.Path(path)
    self._unwritten: dict[str, bytes] = {}  # file -> what a full disk had no room for
    self._begin_events()

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Write a line of metrics.jsonl and a point of each curve. A value that is not finite becomes null."""
    numbers = {name: np.asarray(value).item() for name, value in values.items()}
    # JSON knows neither NaN nor infinity, and strict readers refuse the line.
    line = {"step": step, **{name: x if math.isfinite(x) else None for name, x in numbers.items()}}
    self._append("metrics.jsonl", (json.dumps(line, allow_nan=False) + "\n").encode())
    self._write_values(step, [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()])
    if self._mirror:
      self._mirror.copy_if_due()
    if self._tracker:
      self._tracker.log(step, {name: x for name, x in numbers.items() if math.isfinite(x)})

  def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write a picture, such as a grid of samples, to samples/<name>_<step>.png and TensorBoard."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    content = buffer.getvalue()
    file = self._path / "samples" / f"{name}_{step:08d}.png"
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(file, content)
    except Exception as error:
      if not (may_pass(error) or getattr(error, "errno", None) in FULL_DISK):
        raise
      logging.warning("cannot write %s: %s; it is left out", file, getattr(error, "strerror", None) or error)
    height, width, channels = image.shape
    png = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)
    self._write_values(step, [Summary.Value(tag=name, image=png)])
    if self._tracker:
      self._tracker.log(step, {name: self._tracker.image(image)})

  def flush(self) -> bool:
    """Bring all lines into the run's folder, and return whether they are there.

    Call it before a checkpoint is saved: a run that resumes from it then lacks no line of the steps before.
    """
    return not self._unwritten and (self._mirror is None or self._mirror.copy())

  def close(self) -> None:
    for name in [*self._unwritten]:
      self._append(name, b"")
    if self._mirror:
      self._mirror.close()
    if self._tracker:
      self._tracker.close()

  def _write_values(self, step: int, values: list[Summary.Value]) -> None:
    self._write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def _begin_events(self) -> None:
    # TensorBoard reads a run's files in the order of their names: of two starts within a second the later one last.
    self._events = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
    self._write_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

  def _write_event(self, event: Event) -> None:
    file = self._appended / self._events
    # Pictures come to gigabytes in a long run, which a bucket would get again with each copy.
    is_full = self._mirror and file.exists() and file.stat().st_size >= MOST_EVENTS
    if is_full and self._events not in self._unwritten:  # of which some is still to be written
      self._begin_events()
    # Without TensorBoard's own writer, whose thread holds events back for up to two minutes.
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    self._append(self._events, record.getvalue())

  def _append(self, name: str, content: bytes) -> None:
    """Append to a file and close it, so that a killed process loses nothing.

    What a full disk has no room for is written with the next content.
    """
    waiting, content = name in self._unwritten, self._unwritten.pop(name, b"") + content
    path = self._appended / name
    before = path.stat().st_size if path.exists() else 0
    try:
      with path.open("ab") as file:
        file.write(content)
    except OSError as error:
      if error.errno not in FULL_DISK:
        raise
      if path.exists():
        os.truncate(path, before)  # of a part that found room
      self._unwritten[name] = content
      if not waiting:
        logging.warning("cannot write %s: %s; its lines are kept until there is room", path, error.strerror)


class _NoWriter(Writer):
  """Writes nothing, in a process that is not the writer."""

  def __init__(self) -> None:
    pass

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    pass

  def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    pass

  def flush(self) -> bool:
    return True

  def close(self) -> None:
    pass


def open_writer(
  workdir: epath.PathLike,
  *,
  start_step: int,
  is_writer: bool,
  evaluated: bool = True,
  open_tracker: Callable[[], Tracker | None] = lambda: None,
) -> Writer:
  """Open the writer of a run that begins, or resumes, after `start_step` steps, and its tracker.

  Lines of metrics.jsonl beyond that step are dropped, since those steps are taken again. So are the lines of
  evaluations at that step, unless it is `evaluated`.
  """
  if not is_writer:
    return _NoWriter()
  path = buckets.path(workdir)
  path.mkdir(parents=True, exist_ok=True)
  _drop_lines_beyond(path / "metrics.jsonl", start_step, evaluated=evaluated)
  mirror = buckets.Mirror(path, of=["metrics.jsonl"]) if buckets.is_url(path) else None
  return Writer(path, mirror, open_tracker())


def _drop_lines_beyond(path: epath.Path, step: int, *, evaluated: bool) -> None:
  def stays(found: Mapping[str, Any]) -> bool:
    is_again = found.get("step") == step and not evaluated and any("/" in name for name in found)
    # A line without a step was cut off or damaged, and goes too.
    return found.get("step", step + 1) <= step and not is_again

  lines = files.lines(path)
  found = [history.metrics_of(line) for line in lines]
  history.warn_of_lost(found)
  kept = [line for line, each in zip(lines, found, strict=True) if stays(each)]
  if len(kept) < len(lines):
    files.write_whole(path, "".join(line + "\n" for line in kept).encode())


# What a loss adds up; its quarters of the timestep are in metrics.jsonl.
_PART = re.compile(r"loss_(?!.*_q[1-4]$)\w+")
# As the paper names them; others by their column.
_SYMBOLS = {"loss_generation": "L_IG", "loss_discrimination": "L_ITA", "loss_class_contrastive": "class"}


class Throughput:
  """Measures how fast a run is, for the progress line and for metrics.jsonl."""

  def __init__(
    self,
    *,
    start_step: int,
    num_steps: int,
    batch_size: int,
    peak_rate: float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """
    Args:
      start_step: steps already finished.
      num_steps: steps of the whole run.
      batch_size: images a step, over all processes.
      peak_rate: steps a second at the chips' peak; None where it is not known.
      clock: seconds.
    """
    self._num_steps = num_steps
    self._batch_size = batch_size
    self._peak_rate = peak_rate
    self._clock = clock
    self.restart(start_step)

  def steps(self) -> Iterator[int]:
    """Yield the numbers of the steps that are left, with a bar on a terminal."""
    first = self._step + 1
    with progress.bar("training", self._num_steps, "steps", done=first - 1) as bar:
      for step in range(first, self._num_steps + 1):
        yield step
        bar.update(1)

  @contextlib.contextmanager
  def waiting_for_data(self, is_busy: Callable[[], bool]) -> Iterator[None]:
    """Around loading the next batch: its time is the share `data_wait`, unless `is_busy` says at its end that the
    devices are still at an earlier step, so that none of it was lost."""
    begin = self._clock()
    yield
    if not is_busy():
      self._waited += self._clock() - begin

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leave out the time within, such as of an evaluation or a save."""
    begin = self._clock()
    yield
    self._begin += self._clock() - begin

  def restart(self, step: int) -> None:
    """Count from here, after `step` steps: after a report, and after the first step, which compiles."""
    self._step = step
    self._begin = self._clock()
    self._waited = 0.0

  def report(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Log the progress line, and return the speeds since the last report.

    Args:
      step: steps finished, more than at the last report.
      metrics: `loss` and its parts are shown.

    Returns:
      `steps_per_sec`, `images_per_sec`, and `data_wait`, the share of time spent waiting for data, in [0, 1]; where the
      chips' peak is known `mfu`, the share of it that the steps' operations are. NaN where no step counted.
    """
    # The clock may not have moved since the last report.
    seconds = max(self._clock() - self._begin, 1e-9)
    counted = step - self._step
    rate = counted / seconds if counted else math.nan
    speeds = {
      "steps_per_sec": rate,
      "images_per_sec": rate * self._batch_size,
      "data_wait": min(self._waited / seconds, 1.0) if counted else math.nan,
    }
    if self._peak_rate is not None:
      speeds["mfu"] = rate / self._peak_rate
    logging.info("%s", self._line(step, metrics, speeds))
    self.restart(step)
    return speeds

  def _line(self, step: int, metrics: Mapping[str, Any], speeds: Mapping[str, float]) -> str:
    known = [name for name in _SYMBOLS if name in metrics]  # L_IG first; jax sorts metrics by their names
    parts = {name: float(metrics[name]) for name in [*known, *metrics] if _PART.fullmatch(name)}
    shown = [f"step {step}/{self._num_steps}", f"loss {float(metrics['loss']):.4f}"]
    if len(parts) > 1:  # a single one is the loss itself
      shown += [f"{_SYMBOLS.get(name, name.removeprefix('loss_'))} {x:.3g}" for name, x in parts.items()]
    if not math.isnan(rate := speeds["steps_per_sec"]):
      shown += [
        f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step",
        f"data wait {speeds['data_wait']:.0%}",
        f"{_duration((self._num_steps - step) / rate)} left",
      ]
    return "  ".join(shown)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, rest = divmod(hours, 24)
  if days > 1:
    return f"{days}d{rest:02}h"
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
