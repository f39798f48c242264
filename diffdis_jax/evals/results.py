"""The file of results: {task: {data set: record}}, written after each set, so that a suite's second call resumes.

A figure that is not finite is null there, since JSON has no NaN, and NaN here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
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


def make_record(*, metrics: Any, protocol: Any, provenance: Any, **names: str) -> dict[str, Any]:
  """Return one result in CLIP_benchmark's schema, which users' tools read, and our `protocol` and `provenance` beside
  it; `names` are its dataset, model, pretrained and task."""
  of_run = {"language": "en", "protocol": dict(protocol), "provenance": dict(provenance)}
  return {**names, "metrics": dict(metrics), **of_run}


def together(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """Describe what made a figure of several records: each value of `commits`, `versions`, `devices`, `processors` once,
  null for a record that has none; and `clean`, whether all were."""
  origins = [record.get("provenance") or {} for record in records]
  # As text, since dicts have no hash; sorted, so that the same records give the same bytes.
  texts = lambda name: sorted({json.dumps(origin.get(name), sort_keys=True) for origin in origins})
  names = {"commits": "commit", "versions": "versions", "devices": "device", "processors": "processors"}
  values = {plural: [json.loads(text) for text in texts(name)] for plural, name in names.items()}
  return {**values, "clean": all(origin.get("clean") is True for origin in origins) if origins else None}


def fingerprint(params: Mapping[str, Any]) -> str:
  """Hash the values of all parameters: the same on every process, whatever the mesh. It takes seconds a gigabyte."""
  digest = hashlib.sha256()
  for name in sorted(params):
    value = processes.whole(params[name])
    digest.update(f"{name} {value.shape} {value.dtype}\n".encode() + value.tobytes())
  return digest.hexdigest()


def read(path: str) -> Results:
  """Read the results of a file that `evaluate` wrote. Raises UserError: there is none, or it is something else."""
  try:
    content = files.read_json(path)
  except UserError as error:
    raise UserError(f"cannot read results from {path}: {error}; it should be what evaluate --out wrote") from error
  tasks = content.values() if isinstance(content, dict) and content else [None]
  records: list[Any] = [record for task in tasks for record in (task.values() if isinstance(task, dict) else [None])]
  are_dicts = lambda *values: all(isinstance(value, dict) for value in values)
  if not all(are_dicts(one) and RECORD <= one.keys() and are_dicts(one["metrics"], one["protocol"]) for one in records):
    raise UserError(f"{path} holds no results of evaluate, which are {{task: {{data set: record}}}}")
  return _with_metrics(content, lambda value: math.nan if value is None else value)


def _with_metrics(results: Mapping[str, Any], changed: Callable[[Any], Any]) -> Results:
  """Return the same results with `changed` applied to each figure."""

  def with_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "metrics": {name: changed(value) for name, value in record["metrics"].items()}}

  return {task: {name: with_metrics(record) for name, record in records.items()} for task, records in results.items()}


def is_mean(dataset: str) -> bool:
  """Return whether a record of this name is a mean over others."""
  return dataset.startswith(MEAN)


class ResultFile:
  """Results on the disk after each set. Means over sets are written at the end, and not read back.

  Args:
    path: of the file.
    resumes: what it already has is kept, and not measured again.

  Raises UserError: the file is there and holds no results.
  """

  def __init__(self, path: str, *, resumes: bool = True):
    self._path, self.resumes, self.results = path, resumes, {}
    if resumes and buckets.path(path).exists():
      # Means are left out: with a set more they are others.
      for task, records in read(path).items():
        self.results[task] = {name: record for name, record in records.items() if not is_mean(name)}

  def has(self, task: str, dataset: str, protocol: Mapping[str, Any]) -> bool:
    """Return whether the set is measured; the same on every process.

    Raises UserError: it is, by another protocol; or another set is, with other weights.
    """
    record = self.results.get(task, {}).get(dataset)
    # Two sets by different protocols in one table would be compared by its readers.
    if record is not None:
      self._check(dataset, _known_before(record["protocol"]), _known_before(protocol))
    # A mean over sets is of one model.
    for records in self.results.values():
      for name, other in records.items():
        there = {field: other["protocol"][field] for field in OF_A_MODEL if field in other["protocol"]}
        self._check(name, there, {field: protocol.get(field) for field in there})
    # The file may be on process 0's disk alone; whether to measure is one decision.
    is_there = bool(processes.from_first(np.uint8(record is not None)))
    if is_there:
      logging.info("%s: %s is already in %s", task, dataset, self._path)
    return is_there

  def _check(self, dataset: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for field, values in differences([before, now]).items():
      there, here = (json.dumps(value, ensure_ascii=False)[:60] for value in values)
      raise UserError(
        f"--out={self._path} has {dataset} by another protocol, {field} {there} where this measurement has {here}; name"
        " a new file, or remove it"
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
  """Check, before work that takes hours, that the file can be written. Raises UserError: it cannot."""
  out = buckets.path(path)
  # Folders on the way are made with the file: where they are absent, what counts is the first that is there.
  there = out.parent if buckets.is_url(out) else next(parent for parent in out.parents if parent.exists())
  files.check_out(os.fspath(there / out.name))


def write_text(path: str, text: str) -> None:
  """Write a text to a file. Raises UserError: it cannot be written."""
  with files.writing(f"--out={path}"):
    buckets.path(path).parent.mkdir(parents=True, exist_ok=True)
  files.write_out(path, text)


def differences(protocols: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
  """Return field -> its value in each of the protocols, of the fields in which they differ; None where one lacks it."""
  # One of them was read from a file, where tuples are lists.
  plain = [json.loads(json.dumps(dict(protocol))) for protocol in protocols]
  names = dict.fromkeys(field for protocol in plain for field in protocol)
  values = {field: [protocol.get(field) for protocol in plain] for field in names}
  return {field: row for field, row in values.items() if any(value != row[0] for value in row)}


def _known_before(protocol: Mapping[str, Any]) -> dict[str, Any]:
  """Return what is known of a measurement before it; of FID's reference, the name of another tool's file."""
  known = {field: value for field, value in protocol.items() if field not in AFTERWARDS}
  reference = protocol.get("reference")
  return known | ({"reference": reference["name"]} if reference and not reference["protocol"] else {})
