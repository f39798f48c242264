"""Record the history of a run and the origin of a figure, without paths of a machine.

history.jsonl has an object on each line, with `event` and `time` (seconds since 1970). A `start` has the step, the
devices and the data. Its `reached` and `until` are the last step that was logged before, and its time: the steps
between `step` and `reached` are repeated. An `end` has the cause. A start without an end was killed, or still runs.

Every record of evaluate, ablate, benchmark and demo has a `provenance`: the code, the versions, the machine, and the
run with all runs from which it started.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import pathlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

import diffdis_jax
from diffdis_jax.common import buckets, files, machine, one_file
from diffdis_jax.config import read_fields
from diffdis_jax.errors import Preempted, UserError, parse_json
from diffdis_jax.run import workdir

HISTORY = "history.jsonl"
ROOT = pathlib.Path(__file__).parents[2]  # the checkout, or the folder of an installed package
# The folders of an absolute path or of a bucket's address, anywhere in a text. At the beginning of a value they may
# have blanks. After a blank they end at the next blank, since other words may follow.
_WORD = r"[^\s,:;=/'\"]+"
_FOLDERS = re.compile(
  rf"(?:(?<![^,:;='\"(\[])(?:\w+:/)?/(?:{_WORD}(?: +{_WORD})*/)*|(?<![\w.)}}])(?:\w+:/)?/(?:{_WORD}/)*)(?=[^\s/])"
)


class Result(NamedTuple):
  """A `record`, in a `file` of the workdir, of the `metrics` that evaluate measured on a data set."""

  file: str
  task: str
  dataset: str
  record: dict[str, Any]


@contextlib.contextmanager
def recorded(path: epath.PathLike, *, step: int, is_writer: bool, facts: Mapping[str, Any]) -> Iterator[None]:
  """Record the start of a run after `step` steps, with these `facts`, and its end. Only the writer records them.

  Enter it before the run's writer is opened, which drops lines of the log.
  """
  if not is_writer:
    yield
    return
  folder, end = buckets.path(path), {"why": "failed"}
  reached = next(filter(None, reversed(metrics_of(files.lines(folder / "metrics.jsonl")))), None)
  before = {"reached": reached["step"], "until": reported(folder)} if reached else {}
  _append(folder, {"event": "start", "time": time.time(), "step": step, **before, **facts})
  try:
    yield
    end = {"why": "finished"}
  except Preempted:
    end = {"why": "stopped"}
    raise
  except Exception as error:
    end["message"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    raise
  finally:
    _append(folder, {"event": "end", "time": time.time(), **end})


def _append(folder: epath.Path, line: Mapping[str, Any]) -> None:
  file = folder / HISTORY
  cut_off = file.exists() and not file.read_bytes().endswith(b"\n")
  with buckets.appended(file) as appended:
    appended.write(("\n" * cut_off + json.dumps(line) + "\n").encode())


def read(path: epath.PathLike) -> list[dict[str, Any]]:
  """Read the events of history.jsonl without lines that were cut off. A missing file has none."""
  return [line for line in map(parse, files.lines(buckets.path(path) / HISTORY)) if "event" in line]


def results(path: epath.PathLike) -> list[Result]:
  """Return the results of evaluate in the workdir, or in a run in one file."""
  if (packed := one_file.at(path)) is not None:
    contents = dict(one_file.read_record(packed).results)
  else:
    # Files of results have any name, so recognise them by their content.
    contents = {file.name: files.read_object(file) for file in sorted(buckets.path(path).glob("*.json"))}
  return [
    Result(name, task, dataset, record)
    for name, content in contents.items()
    for task, records in content.items()
    for dataset, record in (records.items() if isinstance(records, dict) else ())
    if isinstance(record, dict) and isinstance(record.get("metrics"), dict)
  ]


def reported(path: epath.PathLike) -> float | None:
  """Return the time at which metrics.jsonl was last written, in seconds since 1970, or None without the file."""
  file = buckets.path(path) / "metrics.jsonl"
  return file.stat().mtime if file.exists() else None


def metrics_of(lines: Sequence[str]) -> list[dict[str, Any]]:
  """Read the `step` and the numbers of each line of metrics.jsonl. A number that was not finite is None.

  A line without a step gives an empty dict. A warning counts such lines, except for the last, which may be cut off.
  """
  numbers = [_numbers(parse(line)) for line in lines]
  if lost := sum(not values for values in numbers[:-1]):
    logging.warning("metrics.jsonl has %d lines that cannot be read; they are left out", lost)
  return numbers


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
  step = line.get("step")
  if type(step) is not int or not 0 <= step < 2**53:
    return {}
  return {name: x for name, x in line.items() if x is None or type(x) in (int, float) and abs(x) < 2**63}


def parse(line: str | bytes) -> dict[str, Any]:
  """Parse a JSON object; return an empty one if the line is cut off, or is still being written."""
  with contextlib.suppress(UserError):
    if isinstance(content := parse_json(line, "a line"), dict):
      return content
  return {}


def provenance(run: Mapping[str, Any]) -> dict[str, Any]:
  """Describe the origin of a record: the `code`, the `device`, the number of `processors` of this process, and the
  `run`, which is `of_run` or `of_config`, or for several models a dictionary of these by name."""
  import jax  # here, since it takes seconds and reports do not need it

  device = {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
  return {**code(), "device": device, "processors": machine.processors(), "run": dict(run)}


@functools.cache
def code() -> dict[str, Any]:
  """Return the `commit`, None for an installed wheel; `clean`, whether the files are those of the commit; and the
  `versions`. The values are those of the first call."""
  commit, clean = _checkout(ROOT)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
  return {"commit": commit, "clean": clean, "versions": {"diffdis_jax": diffdis_jax.__version__, **versions}}


def of_run(path: str, *, step: int | None) -> dict[str, Any]:
  """Describe a trained run.

  Args:
    path: its workdir.
    step: the step of the used checkpoint, or None.

  Returns:
    config_hash: the hash of the fields that affect the numbers, with only the last part of paths. Without a readable
      config, it is None, like seed and objectives.
    seed, objectives: fields of the config.
    steps: the finished steps of the checkpoint.
    commits: the commits of the code that trained it, in order, by its history; `clean` is as in `code`.
    imported: the source of an import by import_weights; other runs have no such field.
    init_from: the runs from which it started, the nearest first, each with these fields.
  """
  if (file := one_file.at(path)) is not None:
    return one_file.read_record(file).provenance
  try:
    config = read_fields(path)
  except UserError:
    config = None
  events = read(path)
  starts = [event for event in events if "commit" in event]
  cleans = [event.get("clean") for event in starts]
  source = files.read_object(buckets.path(path) / "import.json").get("source")
  # Take the last one: a run that has saved nothing may begin again, from another start.
  began_from = (event["init_from"] for event in reversed(events) if "init_from" in event)
  return {
    **_fields(config),
    "steps": step,
    "commits": [*dict.fromkeys(event["commit"] for event in starts)],
    "clean": None if not cleans or None in cleans else all(cleans),
    **({"imported": public(source)} if source else {}),
    "init_from": next(began_from, []),  # an import has no history
  }


def of_config(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Describe an untrained network like `of_run`."""
  return {**_fields(dict(fields)), "steps": 0, "commits": [], "clean": None, "init_from": []}


def behind(init_from: str) -> list[dict[str, Any]]:
  """List the runs behind a run that starts from this workdir, the nearest first; none for "".

  It is recorded when a run begins, and so is known even if the folders are deleted later.
  """
  if not init_from:
    return []
  start = of_run(init_from, step=None if one_file.at(init_from) else workdir.latest_step(init_from))
  return [{name: value for name, value in start.items() if name != "init_from"}, *start["init_from"]]


def public(value: Any) -> Any:
  """Remove the folders of absolute paths and buckets' addresses from JSON: `/data/sd/v1.ckpt` becomes `v1.ckpt`."""
  if isinstance(value, Mapping):
    return {name: public(child) for name, child in value.items()}
  if isinstance(value, list | tuple):
    return [public(child) for child in value]
  return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _fields(config: dict[str, Any] | None) -> dict[str, Any]:
  """Describe a config. The hash does not depend on the folders of the run and its data."""
  if config is None:
    return {"config_hash": None, "seed": None, "objectives": None}
  fields = {
    field: str(value).rstrip("/").rpartition("/")[2] if field.split(".")[-1] == "path" else value
    for field, value in workdir.identity(config).items()
    if field != "init_from"
  }
  return {"config_hash": workdir.digest(fields), "seed": config.get("seed"), "objectives": [*config["objectives"]]}


def _checkout(root: pathlib.Path) -> tuple[str | None, bool | None]:
  """Return the commit by git, and whether the files are its own. Untracked files count only in the package."""
  # The Dockerfile writes this file, and so does launch/tpu_pod.sh, which appends the installed extras.
  if (root / ".commit").is_file():
    described, untracked = (root / ".commit").read_text().partition(" ")[0], ""
  # Look only in the root itself: a wheel may be installed inside a user's repository.
  elif not (root / ".git").exists():
    return None, None
  else:
    try:
      described = _git(root, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
      untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", "diffdis_jax")
    except (OSError, subprocess.SubprocessError):  # no git, no commit, or git refuses
      return None, None
  commit, changed, _ = described.strip().partition("-dirty")
  return commit, not changed and not untracked


def _git(root: pathlib.Path, *arguments: str) -> str:
  """Run git in this folder, even if another user owns it."""
  command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
