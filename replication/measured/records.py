"""Read the measured records, one JSON file for each topic, for tables.py, the figures and the tests.

Two kinds of topics:

  emoji, shapes: the results of `evaluate` for each run. `results` returns them with today's names.
  all others: records of figures, by name. `load` returns them as `Record`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
TASKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}  # clip_benchmark's names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A number that was measured, or read in the paper.

  Attributes:
    what: the measured quantity.
    unit: unit of the values; "" for a plain number.
    values: values by seed, if they are known; else the value of the only run.
    mean, sd, n: statistics, stored only if the values of the seeds were not; otherwise they follow from values.
    se, p: standard error and p of a mean of paired differences, under the same rule.
    page: path of the page that shows it, from the repository's root, or the paper.
    of: command, processor, commit, ..., as far as they are known. In the file a name in `settings` can stand for these.
  """

  what: str
  page: str
  unit: str = ""
  values: Mapping[str, float] = dataclasses.field(default_factory=dict)
  mean: float | None = None
  sd: float | None = None
  n: int | None = None
  se: float | None = None
  p: float | None = None
  of: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def value(self) -> float:
    """Return the value of the only run.

    Raises:
      UserError: there are several values.
    """
    if len(self.values) != 1:
      raise UserError(f"{self.what!r} has {len(self.values)} values; ask for one by its seed")
    return next(iter(self.values.values()))


@functools.cache
def read(topic: str) -> dict[str, Any]:
  """Read the file of a topic. Raises UserError if there is none."""
  path = HERE / f"{topic}.json"
  if not path.exists():
    topics = ", ".join(sorted(path.stem for path in HERE.glob("*.json")))
    raise UserError(f"replication/measured has no topic {topic!r}; it has {topics}")
  return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def load(topic: str) -> dict[str, Record]:
  """Load name -> record for a topic of figures. Raises UserError if there is no such topic."""
  stored = read(topic)
  settings = stored.get("settings", {})
  of = {name: _settings(fields.get("of", {}), settings) for name, fields in stored["records"].items()}
  return {name: Record(**{**fields, "of": of[name]}) for name, fields in stored["records"].items()}


def _settings(of: str | Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
  if isinstance(of, str):
    return settings[of]
  own = dict(of)
  return {**settings.get(own.pop("settings", ""), {}), **own}


def record(topic: str, name: str) -> Record:
  """Return a record of a topic by its name. Raises UserError if there is none."""
  records_of_topic = load(topic)
  if name not in records_of_topic:
    raise UserError(f"replication/measured/{topic}.json has no record {name!r}; it has {', '.join(records_of_topic)}")
  return records_of_topic[name]


def value(topic: str, name: str, seed: str = "") -> float:
  """Return the value of a record for a seed, or for the only run. Raises UserError if there is none."""
  chosen = record(topic, name)
  if not seed:
    return chosen.value
  if seed not in chosen.values:
    raise UserError(f"{name!r} of replication/measured/{topic}.json has no {seed!r}; it has {', '.join(chosen.values)}")
  return chosen.values[seed]


@functools.cache
def results(topic: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
  """Return run -> its results of `evaluate`, {task: {data set: record}}, for the topic `emoji` or `shapes`."""
  stored = read(topic)
  return {name: _results_of(run, stored["protocols"]) for name, run in stored["runs"].items()}


def _results_of(run: Mapping[str, Any], protocols: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
  own = {name: run[name] for name in ("checkpoint", "weights") if name in run}
  by_task: dict[str, dict[str, dict[str, Any]]] = {}
  for task, sets in run["metrics"].items():
    for dataset, (protocol, metrics) in sets.items():
      by_task.setdefault(task, {})[dataset] = {
        "dataset": dataset,
        "model": "diffdis_jax",
        "pretrained": run["run"],
        "task": TASKS.get(task, task),
        "metrics": metrics,
        "language": "en",
        "protocol": {**protocols[protocol], **own},
      }
  return by_task


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Return a Markdown table."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def interval(mean: float, half: float, *, sign: str = "", unit: str = "") -> str:
  """Return `12.3 ± 0.4`, a mean and half of its 95 % interval."""
  # Round first, so that -0.0 cannot remain.
  rounded = round(mean, 1)
  text = f"{rounded or 0.0:{sign if rounded else ''}.1f}".replace("-", "−")
  return f"{text} ± {half:.1f}{unit}"
