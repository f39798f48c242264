"""Write a run's reports: metrics.jsonl, TensorBoard, a tracker and sample images.

Only one process writes; on the others a Writer does nothing.
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from diffdis_jax.common import buckets, files
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
    points = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
    self._write_event(step=step, summary=Summary(value=points))
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
    self._write_event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=png)]))
    if self._tracker:
      self._tracker.log(step, {name: self._tracker.image(image)})

  def flush(self) -> None:
    """Bring all lines into the run's folder, before a checkpoint from which a run would resume without them."""
    if self._mirror:
      self._mirror.copy()

  def close(self) -> None:
    for name in [*self._unwritten]:
      self._append(name, b"")
    if self._mirror:
      self._mirror.close()
    if self._tracker:
      self._tracker.close()

  def _begin_events(self) -> None:
    # TensorBoard reads a run's files in the order of their names: of two starts within a second the later one last.
    self._events = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
    self._write_event(file_version="brain.Event:2")

  def _write_event(self, **fields: Any) -> None:
    file = self._appended / self._events
    # Pictures come to gigabytes in a long run, which a bucket would get again with each copy.
    is_full = self._mirror and file.exists() and file.stat().st_size >= MOST_EVENTS
    if is_full and self._events not in self._unwritten:  # of which some is still to be written
      self._begin_events()
    # Without TensorBoard's own writer, which imports TensorFlow, and holds events back for up to two minutes.
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
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

  def __init__(self) -> None: ...
  def scalars(self, step: int, values: Mapping[str, Any]) -> None: ...
  def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None: ...
  def flush(self) -> None: ...
  def close(self) -> None: ...


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
  lines = files.lines(path)
  found = [history.metrics_of(line) for line in lines]
  history.warn_of_lost(found)
  kept = []
  for line, metrics in zip(lines, found, strict=True):
    at = metrics.get("step", step + 1)  # a line without a step was cut off or damaged, and goes too
    if at < step or (at == step and (evaluated or not any("/" in name for name in metrics))):
      kept.append(line + "\n")
  if len(kept) < len(lines):
    files.write_whole(path, "".join(kept).encode())
