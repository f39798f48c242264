"""Write a run's logs: metrics.jsonl, TensorBoard, sample images and, as a tracker, Weights & Biases.

Only one process writes; on the others a Writer does nothing. The tracker reads its settings from its environment
variables, such as WANDB_MODE=offline.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError, not_installed
from diffdis_jax.run import provenance

TRACKERS = ("wandb",)
MOST_EVENTS = 2**23  # bytes of a TensorBoard file; a bucket gets the whole file again each time it has grown
IDS = "trackers.json"  # the run's id at each tracker, so that a resumed run continues there


class Tracker:
  """A run of Weights & Biases: a new one, or the one that began earlier in the same workdir.

  Args:
    workdir: the folder of the run.
    config: the run's config.
  """

  def __init__(self, workdir: epath.PathLike, config: Mapping[str, Any]):
    path, self._module = buckets.path(workdir), importlib.import_module("wandb")
    ids = files.read_object(path / IDS)
    if "wandb" not in ids:
      ids["wandb"] = secrets.token_hex(4)
      files.write_json(path / IDS, ids)
    how: dict[str, Any] = {"config": dict(config), "resume": "allow", "name": path.name, "id": ids["wandb"]}
    how["project"] = os.environ.get("WANDB_PROJECT", "diffdis_jax")
    self._run: Any = self._module.init(**how, dir=None if buckets.is_url(path) else os.path.abspath(path))
    self._run.define_metric("*", step_metric="step")

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    """Send the values of a step, which are numbers or pictures as arrays."""
    sent = {name: self._module.Image(x) if isinstance(x, np.ndarray) else x for name, x in values.items()}
    # wandb's own step can only grow, and would refuse the steps that a killed run repeats.
    self._run.log({"step": step, **sent})

  def close(self) -> None:
    self._run.finish()


def check_tracker(kind: str) -> None:
  """Raise UserError, before a program is compiled, if the tracker is not installed or nobody is signed in. An empty
  kind is no tracker."""
  if kind and importlib.util.find_spec(kind) is None:
    raise not_installed(f"--tracker={kind}", f"the package {kind}", kind)
  if kind == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
    wandb: Any = importlib.import_module("wandb")
    try:
      wandb.login(verify=False)  # a server that does not answer now may answer later
    except wandb.Error as error:
      raise UserError(f"--tracker=wandb: {error} With WANDB_MODE=offline the numbers stay here.") from error


class Writer:
  """Write scalars and images of a run to files, to TensorBoard and to a tracker.

  Args:
    path: the run's folder.
    mirror: a local copy of the files that grow, if that folder is in a bucket.
    tracker: a tracker that gets the same values.
  """

  def __init__(self, path: epath.Path, mirror: buckets.Mirror | None = None, tracker: Tracker | None = None) -> None:
    self._path, self._mirror, self._tracker = path, mirror, tracker
    self._appended = mirror.folder if mirror else pathlib.Path(path)
    self._begin_events()

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Write a line of metrics.jsonl and a point of each curve. A value that is not finite becomes null."""
    numbers = {name: np.asarray(value).item() for name, value in values.items()}
    finite = {name: x for name, x in numbers.items() if math.isfinite(x)}
    # JSON has neither NaN nor infinity, and strict readers would refuse the line.
    line = {"step": step, **{name: finite.get(name) for name in numbers}}
    self._append("metrics.jsonl", (json.dumps(line, allow_nan=False) + "\n").encode())
    self._write_event(step, [{"tag": name, "simple_value": x} for name, x in numbers.items()])
    if self._mirror:
      self._mirror.copy_if_due()
    if self._tracker:
      self._tracker.log(step, finite)

  def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write a picture, such as a grid of samples, to samples/<name>_<step>.png and TensorBoard."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    file = self._path / "samples" / f"{name}_{step:08d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(file, buffer.getvalue())
    height, width, channels = image.shape
    png = {"height": height, "width": width, "colorspace": channels, "encoded_image_string": buffer.getvalue()}
    self._write_event(step, [{"tag": name, "image": png}])
    if self._tracker:
      self._tracker.log(step, {name: image})

  def flush(self) -> None:
    """Copy all lines to the run's folder, so that they are there before the checkpoint from which a run resumes."""
    if self._mirror:
      self._mirror.copy()

  def close(self) -> None:
    for output in filter(None, (self._mirror, self._tracker)):
      output.close()

  def _begin_events(self) -> None:
    # TensorBoard reads files in the order of their names, so that names order two starts within a second, too.
    self._events = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
    self._write_event(None, [])

  def _write_event(self, step: int | None, values: list[dict[str, Any]]) -> None:
    # TensorBoard's own writer imports TensorFlow, and delays events for up to two minutes. The imports are here, since
    # flags are read first.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    content: dict[str, Any] = (
      {"file_version": "brain.Event:2"} if step is None else {"step": step, "summary": {"value": values}}
    )
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
    self._append(self._events, record.getvalue())
    if step is not None and (self._appended / self._events).stat().st_size > MOST_EVENTS:
      self._begin_events()

  def _append(self, name: str, content: bytes) -> None:
    """Append to a file and close it, so that a killed process loses nothing."""
    with (self._appended / name).open("ab") as file:
      file.write(content)


class _NoWriter(Writer):
  """A Writer that writes nothing, for the other processes."""

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
  open_tracker: Callable[[], Tracker] | None = None,
) -> Writer:
  """Open the writer and the tracker of a run that begins or resumes after `start_step` steps.

  Lines of metrics.jsonl after that step are dropped, since those steps are repeated. So are the lines of evaluations at
  that step, unless it is `evaluated`.
  """
  if not is_writer:
    return _NoWriter()
  path = buckets.path(workdir)
  path.mkdir(parents=True, exist_ok=True)
  _drop_lines_beyond(path / "metrics.jsonl", start_step, evaluated=evaluated)
  mirror = buckets.Mirror(path, of=["metrics.jsonl"]) if buckets.is_url(path) else None
  return Writer(path, mirror, open_tracker() if open_tracker else None)


def _drop_lines_beyond(path: epath.Path, step: int, *, evaluated: bool) -> None:
  lines, kept = files.lines(path), []
  for line, metrics in zip(lines, provenance.metrics_of(lines), strict=True):
    at = metrics.get("step", step + 1)  # a line without a step was cut off or damaged, and is dropped
    if at < step or (at == step and (evaluated or not any("/" in name for name in metrics))):
      kept.append(line + "\n")
  if len(kept) < len(lines):
    files.write_whole(path, "".join(kept).encode())
