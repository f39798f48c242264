"""The file of results: {task: {data set: record}}, written after each set, so that a second call resumes.

A figure that is not finite is null there, since JSON has no NaN, and NaN here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes

Results = dict[str, dict[str, dict[str, Any]]]
RECORD = {"dataset", "model", "pretrained", "task", "metrics", "language", "protocol"}
OF_A_MODEL = ("weights", "checkpoint", "ema")  # of a protocol: which model it is of, however it is measured
AFTERWARDS = ("reference", "kid_subset_size")  # of a protocol: known when the set is measured
MEAN = ("mean_over_", "mean_of_")


def read(path: str) -> Results:
  """Read the results of a file that `evaluate` wrote.

  Raises:
    UserError: there is none, or it is something else.
  """
  try:
    found = files.read_json(path)
  except UserError as error:
    raise UserError(f"cannot read results from {path}: {error}; it should be what evaluate --out wrote") from error
  tasks = found.values() if isinstance(found, dict) and found else [None]
  for task in tasks:
    for record in task.values() if isinstance(task, dict) else [None]:
      if not _is_record(record):
        raise UserError(f"{path} holds no results of evaluate, which are {{task: {{data set: record}}}}")
  return _with_metrics(found, lambda value: math.nan if value is None else value)


def _with_metrics(results: Mapping[str, Any], changed: Callable[[Any], Any]) -> Results:
  """Return the same results with `changed` applied to each figure."""

  def with_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "metrics": {name: changed(value) for name, value in record["metrics"].items()}}

  return {task: {name: with_metrics(each) for name, each in records.items()} for task, records in results.items()}


def _is_record(record: Any) -> bool:
  named = isinstance(record, dict) and RECORD <= record.keys()
  return named and all(isinstance(record[field], dict) for field in ("metrics", "protocol"))


def is_mean(dataset: str) -> bool:
  """Return whether a record of this name is a mean over others."""
  return dataset.startswith(MEAN)


class ResultFile:
  """Results of a suite, on the disk after each set. Means over sets are written at the end, and not read back.

  Args:
    path: of the file; what it already has is kept.

  Raises:
    UserError: the file is there and holds no results.
  """

  def __init__(self, path: str):
    self._path, self.results = path, {}
    if buckets.path(path).exists():
      # Means are left out: with a set more they are others.
      for task, records in read(path).items():
        self.results[task] = {name: record for name, record in records.items() if not is_mean(name)}

  def has(self, task: str, dataset: str, protocol: Mapping[str, Any]) -> bool:
    """Return whether the set is measured; the same on every process.

    Raises:
      UserError: it is, by another protocol; or another set is, with other weights.
    """
    record = self.results.get(task, {}).get(dataset)
    # Two sets by different protocols in one table would be compared by its readers.
    if record is not None:
      before = record["protocol"]
      self._check(dataset, differences([before, protocol], ignored=AFTERWARDS))
      self._check(dataset, _of_references(before.get("reference"), protocol.get("reference")))
    # A mean over sets is of one model.
    for records in self.results.values():
      for name, each in records.items():
        there = {field: each["protocol"][field] for field in OF_A_MODEL if field in each["protocol"]}
        self._check(name, differences([there, {field: protocol.get(field) for field in there}]))
    # The file may be on process 0's disk alone; whether to measure is one decision.
    found = bool(processes.from_first(np.uint8(record is not None)))
    if found:
      logging.info("%s: %s is already in %s", task, dataset, self._path)
    return found

  def _check(self, dataset: str, different: Mapping[str, Any]) -> None:
    if different:
      field, (before, now) = next(iter(different.items()))
      raise UserError(
        f"--out={self._path} has {dataset} by another protocol, {field} {_short(before)} where this measurement has"
        f" {_short(now)}; name a new file, or remove it"
      )

  def write(self) -> None:
    """Write the file on process 0. Raises UserError: the file cannot be written."""
    write(self._path, self.results)


def as_written(results: Mapping[str, Any]) -> Results:
  """Return the same results with null for what is not finite, as the file has it."""
  return _with_metrics(results, lambda value: value if math.isfinite(value) else None)


def write(path: str, results: Mapping[str, Any]) -> None:
  """Write results on process 0. Raises UserError: they cannot be written."""
  if processes.is_first():
    write_text(path, files.as_json(as_written(results)))


def check_out(path: str) -> None:
  """Check, before work that takes hours, that the file can be written. Raises UserError: no file of this name can be
  written, or no folder for it be made."""
  out = buckets.path(path)
  if buckets.is_url(out) or out.parent.is_dir():  # in a bucket a folder appears with its first file
    files.check_out(path)
  else:
    there = next(each for each in out.parents if each.exists())
    if not there.is_dir():
      raise UserError(f"cannot write --out={path}: {there} is a file; name a file in a folder")
    files.check_out(os.fspath(there / out.relative_to(there).parts[0]))


def warn_of_lost(path: str, measured: Collection[tuple[str, str]]) -> None:
  """Warn where the file has results that it will not have after a call which measures these tasks and data sets."""
  try:
    there = read(path) if buckets.path(path).exists() else {}
  except UserError:  # no results
    return
  lost = [f"{task} on {name}" for task, records in there.items() for name in records if (task, name) not in measured]
  if lost:
    shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    logging.warning(
      "--out=%s will lose its %s, which this call does not measure; name another file to keep it", path, shown
    )


def write_text(path: str, text: str) -> None:
  """Write a text to a file. Raises UserError: it cannot be written."""
  with files.writing(f"--out={path}"):
    buckets.path(path).parent.mkdir(parents=True, exist_ok=True)
  files.write_out(path, text)


def differences(protocols: Iterable[Mapping[str, Any]], *, ignored: Iterable[str] = ()) -> dict[str, list[Any]]:
  """Return field -> its value in each of the protocols, of the fields in which they differ; None where one lacks it."""
  # One of them was read from a file, where tuples are lists.
  plain = [json.loads(json.dumps(dict(protocol))) for protocol in protocols]
  fields = dict.fromkeys(field for protocol in plain for field in protocol if field not in {*ignored})
  values = {field: [protocol.get(field) for protocol in plain] for field in fields}
  return {field: found for field, found in values.items() if any(value != found[0] for value in found)}


def _of_references(there: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> dict[str, list[Any]]:
  """Return how what FID compares with differs, by what is known before a measurement: which file it is, or, of one that
  is still to be made, of which real images and how."""
  if not there or not here:
    return {}
  if here["sha256"]:
    return differences([{"reference": each["sha256"]} for each in (there, here)])
  if there["protocol"] is None:  # another tool's
    return differences([{"reference": each["name"]} for each in (there, here)])
  made = [each["protocol"] for each in (there, here)]
  # Not of which path: a folder of data may move.
  known = [{"reference_images": each["images"]["which"], "resampling": each["resampling"]} for each in made]
  return differences(known)


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 60 else f"{text[:57]}..."
