"""Record what happened to a run, and where a figure comes from. The record names no path of a machine.

history.jsonl has one object a line, with `event` and `time` (seconds since 1970). A `start` says from which step, on
which devices, with what it trains; `reached` and `until` are the last step that was reported before, and when: steps
between `step` and `reached` are taken again. An `end` says why. A start that no end follows was killed, or still runs.

Every record of evaluate, ablate, benchmark and demo carries a `provenance`: the code, the versions, the machine, and
the run with all that it began from.
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
ROOT = pathlib.Path(__file__).parents[2]  # of the checkout; of an installed package the folder that it lies in
# The folders of an absolute path or of a bucket's address, wherever in a text it stands. They may have blanks where a
# value begins with them; behind a blank they end at the next one, since words may follow.
_WORD = r"[^\s,:;=/'\"]+"
_FOLDERS = re.compile(
  rf"(?:(?<![^,:;='\"(\[])(?:\w+:/)?/(?:{_WORD}(?: +{_WORD})*/)*|(?<![\w.)}}])(?:\w+:/)?/(?:{_WORD}/)*)(?=[^\s/])"
)


class Result(NamedTuple):
  """A `record` with the `metrics` that evaluate measured on a data set, in a `file` of the workdir."""

  file: str
  task: str
  dataset: str
  record: dict[str, Any]


@contextlib.contextmanager
def recorded(path: epath.PathLike, *, step: int, is_writer: bool, facts: Mapping[str, Any]) -> Iterator[None]:
  """Record the start of a run after `step` steps, with these `facts`, and its end, in the process that `is_writer`.

  Enter it before the run's writer is opened, which drops lines.
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
  """Read the events of history.jsonl, without lines that were cut off. A missing file has none."""
  return [line for line in map(parse, files.lines(buckets.path(path) / HISTORY)) if "event" in line]


def results(path: epath.PathLike) -> list[Result]:
  """Find the results that evaluate left in the folder, or that a run in one file has with it."""
  if (packed := one_file.at(path)) is not None:
    contents = dict(one_file.read_record(packed).results)
  else:
    # Its --out may have any name, so that what a file is shows in its form.
    contents = {file.name: files.read_object(file) for file in sorted(buckets.path(path).glob("*.json"))}
  return [
    Result(name, task, dataset, record)
    for name, content in contents.items()
    for task, records in content.items()
    for dataset, record in (records.items() if isinstance(records, dict) else ())
    if isinstance(record, dict) and isinstance(record.get("metrics"), dict)
  ]


def reported(path: epath.PathLike) -> float | None:
  """Return when metrics.jsonl was last written, in seconds since 1970; None if there is none."""
  file = buckets.path(path) / "metrics.jsonl"
  return file.stat().mtime if file.exists() else None


def metrics_of(lines: Sequence[str]) -> list[dict[str, Any]]:
  """Read the `step` and the numbers of each line of metrics.jsonl; None stands for one that was not finite.

  A line without a step gives an empty dict. A warning counts them, except the last one, which may be cut off.
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
  """Read a JSON object; an empty one if the line was cut off, or is still being written."""
  with contextlib.suppress(UserError):
    if isinstance(content := parse_json(line, "a line"), dict):
      return content
  return {}


def provenance(run: Mapping[str, Any]) -> dict[str, Any]:
  """Describe what made a record, as JSON: the `code`, the `device`, the `processors` that this process may use, and the
  `run`: `of_run` of a trained one, or `of_config`; of several models, name -> one of these."""
  import jax  # which takes seconds, and a report needs none of it

  device = {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
  return {**code(), "device": device, "processors": machine.processors(), "run": dict(run)}


@functools.cache
def code() -> dict[str, Any]:
  """Return `commit`, None of an installed wheel; `clean`, whether the files are those of the commit; and `versions`,
  all as they are when this is first called."""
  commit, clean = _checkout(ROOT)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
  return {"commit": commit, "clean": clean, "versions": {"diffdis_jax": diffdis_jax.__version__, **versions}}


def of_run(path: str, *, step: int | None) -> dict[str, Any]:
  """Describe a trained run.

  Args:
    path: its workdir.
    step: of the checkpoint that is used; None where there is none.

  Returns:
    config_hash: of the fields that its numbers depend on, of paths the last name alone; None of a folder without a
      config that can be read, and so are seed and objectives.
    seed, objectives: of the config.
    steps: finished, in the checkpoint.
    commits: of the code that trained it, in order, as far as its history tells; `clean` as in `provenance`.
    imported: only of a run that import_weights made, from what.
    init_from: the run that it began from, that one's own, and so on, each with these fields.
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
  # From the end: a run whose first start never saved begins again, and may then begin from another one.
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
  """Describe a network that is not trained, as `of_run` does a run."""
  return {**_fields(dict(fields)), "steps": 0, "commits": [], "clean": None, "init_from": []}


def behind(init_from: str) -> list[dict[str, Any]]:
  """List the runs from which a run starts that begins in this workdir, the nearest first; none for "".

  Recorded when the run begins, it is known also when the folders are gone.
  """
  if not init_from:
    return []
  start = of_run(init_from, step=None if one_file.at(init_from) else workdir.latest_step(init_from))
  return [{name: value for name, value in start.items() if name != "init_from"}, *start["init_from"]]


def public(value: Any) -> Any:
  """Take the folders of absolute paths and of buckets' addresses out of JSON: `/data/sd/v1.ckpt` becomes `v1.ckpt`."""
  if isinstance(value, Mapping):
    return {name: public(child) for name, child in value.items()}
  if isinstance(value, list | tuple):
    return [public(child) for child in value]
  return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _fields(config: dict[str, Any] | None) -> dict[str, Any]:
  """Describe a config; its hash is the same wherever the run and its data lie."""
  if config is None:
    return {"config_hash": None, "seed": None, "objectives": None}
  fields = {
    field: str(value).rstrip("/").rpartition("/")[2] if field.split(".")[-1] == "path" else value
    for field, value in workdir.identity(config).items()
    if field != "init_from"
  }
  return {"config_hash": workdir.digest(fields), "seed": config.get("seed"), "objectives": [*config["objectives"]]}


def _checkout(root: pathlib.Path) -> tuple[str | None, bool | None]:
  """Ask git for the commit, and whether the files are its own. Untracked ones count in the package alone."""
  # As the Dockerfile writes it, and launch/tpu_pod.sh, which adds the extras that it has installed.
  if (root / ".commit").is_file():
    described, untracked = (root / ".commit").read_text().partition(" ")[0], ""
  # Only the root itself: a wheel may lie inside of somebody's own repository.
  elif not (root / ".git").exists():
    return None, None
  else:
    try:
      described = _git(root, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
      untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", "diffdis_jax")
    except (OSError, subprocess.SubprocessError):  # no git, no commit, or one that refuses
      return None, None
  commit, changed, _ = described.strip().partition("-dirty")
  return commit, not changed and not untracked


def _git(root: pathlib.Path, *arguments: str) -> str:
  """Run git in this folder, whoever owns it."""
  command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
