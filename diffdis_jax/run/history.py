"""What happened to a run: history.jsonl, one object a line, with `event` and `time` (seconds since 1970).

A `start` says from which step, on which devices, with what it trains; `reached` and `until` are the last step that was
reported before, and when, null where a copy has lost that: steps between `step` and `reached` are taken again. An `end`
says why. A start that no end follows was killed, or still runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import Preempted, UserError, parse_json

FILE = "history.jsonl"
COPIED = 600.0  # seconds by which the file is younger than its last line only in a copy, which has times of its own


class Result(NamedTuple):
  """A `record` with the `metrics` that evaluate measured on a data set, in a `file` of the workdir."""

  file: str
  task: str
  dataset: str
  record: dict[str, Any]


@contextlib.contextmanager
def recorded(workdir: epath.PathLike, *, step: int, is_writer: bool, facts: Mapping[str, Any]) -> Iterator[None]:
  """Record the start and the end of the steps of a run. Enter it before its writer is opened, which drops lines.

  Args:
    workdir: folder of the run.
    step: steps finished.
    is_writer: whether this process writes; one of several processes does.
    facts: JSON values that the start's line gets beside its own.
  """
  if not is_writer:
    yield
    return
  path = buckets.path(workdir)
  reached = last_line(path / "metrics.jsonl")
  before = {} if reached is None else {"reached": reached["step"], "until": reported(path)}
  _append(path, {"event": "start", "time": time.time(), "step": step, **before, **facts})
  why, message = "failed", {}
  try:
    yield
    why = "finished"
  except Preempted:
    why = "stopped"
    raise
  except UserError as error:
    message = {"message": str(error)}
    raise
  except Exception as error:
    message = {"message": f"{type(error).__name__}: {error}"}
    raise
  finally:
    try:
      _append(path, {"event": "end", "time": time.time(), "why": why, **message})
    except Exception as error:  # of a disk or a bucket, which must not take the place of why the run ended
      logging.warning("cannot write to %s: %s", path / FILE, getattr(error, "strerror", None) or error)


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Read the events of the file, without lines that were cut off. A missing file has none."""
  return [line for line in map(parse, files.lines(buckets.path(workdir) / FILE)) if "event" in line]


def results(workdir: epath.PathLike) -> list[Result]:
  """Find the results that evaluate left in the folder."""
  # Its --out may have any name, so that what a file is shows in its form.
  return [
    Result(path.name, task, dataset, record)
    for path in sorted(buckets.path(workdir).glob("*.json"))
    for task, records in files.read_object(path).items()
    for dataset, record in (records.items() if isinstance(records, dict) else ())
    if isinstance(record, dict) and isinstance(record.get("metrics"), dict)
  ]


def reported(workdir: epath.PathLike) -> float | None:
  """Return when metrics.jsonl was last written, in seconds since 1970.

  None if there is none, or in a copy of the folder that did not keep the files' times.
  """
  path = buckets.path(workdir)
  file, own = path / "metrics.jsonl", path / FILE
  if not file.exists():
    return None
  younger = own.stat().mtime if own.exists() else -math.inf  # before its lines are read, to which a run may add
  younger -= max((line["time"] for line in read(path)), default=math.inf)
  return None if younger > COPIED else file.stat().mtime


def last_line(path: epath.Path) -> dict[str, Any] | None:
  """Return the last line of metrics.jsonl that has a step, or None."""
  return next(filter(None, map(metrics_of, reversed(files.lines(path)))), None)


def warn_of_lost(found: Sequence[Any]) -> None:
  """Warn of the lines of metrics.jsonl that cannot be read, except the last one, which may be cut off.

  Args:
    found: the object of each line, in the file's order.
  """
  if lost := sum(not isinstance(each, dict) or not is_step(each.get("step")) for each in found[:-1]):
    logging.warning("metrics.jsonl has %d lines that cannot be read; they are left out", lost)


def metrics_of(line: str) -> dict[str, Any]:
  """Read the `step` and the numbers of a line of metrics.jsonl; None stands for one that was not finite.

  A line without a step gives an empty dict.
  """
  found = parse(line)
  if not is_step(found.get("step")):
    return {}
  return {name: value for name, value in found.items() if value is None or _is_number(value)}


def is_step(value: Any) -> bool:
  """Return whether a value can be a number of steps."""
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def parse(line: str | bytes) -> dict[str, Any]:
  """Read a JSON object; an empty one if the line was cut off, or is still being written."""
  try:
    found = parse_json(line, "a line")
  except UserError:
    return {}
  return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
  """Return whether a value fits into an array of floats."""
  return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _append(path: epath.Path, line: Mapping[str, Any]) -> None:
  file = path / FILE
  cut_off = file.exists() and not file.read_bytes().endswith(b"\n")
  with buckets.appended(file) as appended:
    appended.write(("\n" * cut_off + json.dumps(line) + "\n").encode())
