"""Keeps what an experiment of replication/protocol.md has measured, and says it on replication/index.md.

  python -m replication.measured.replication --tables=runs/e1/tables.json

writes the figures of every arm by seed into replication.json beside this file, with where they come from: the
provenance of all, and of each run its config hash, seed, steps, minutes and the runs that it started from. Then
`python -m replication.measured.tables` writes the page's tables, and `make figures` its figures.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from diffdis_jax.ablate import significance
from diffdis_jax.common import files
from replication import claims as judging
from replication.measured import records

FLAGS = flags.FLAGS
FILE = records.HERE / "replication.json"
PAGE = "replication/index.md"
ABOUT = "Experiments of replication/protocol.md: figures of each arm by seed. Written by replication.py."

NOT_RUN = "not run yet"
QUESTIONS = {
  "e1": "do the two tasks help each other?",
  "e2": "why does generation first help?",
  "e3": "which parts matter?",
  "e4": "is the lead over CLIP fair?",
  "e5": "does it hold for classes that are rare in the start too?",
  "e6": "does stronger augmentation make the better CLIP?",
  "e7": "which parts matter on emoji?",
  "e8": "does joint training help discrimination on emoji?",
  "e9": "which timestep of the clean image on emoji?",
  "e10": "is the text query used?",
  "e10_emoji": "is the text query used, on emoji?",
}


class Claim(NamedTuple):
  """The paper's claim, and the comparison that tests it: `row` − `base`, which should be `expected`.

  `words` name the figure where the paper's own figures disagree.
  """

  words: str
  experiment: str
  row: str
  base: str
  expected: str


PAPER = (
  Claim("joint training helps discrimination", "e1", "both", "discrimination", "higher"),
  Claim("the same, on emoji", "e8", "both", "discrimination", "higher"),
  Claim("joint training helps generation", "e1", "both", "generation", "higher"),
  Claim("a trained generator is a good start", "e2", "discrimination after generation", "discrimination", "higher"),
  Claim("Table 2: data is the better text target by top-1", "e3", "target noise", "discrimination", "lower"),
  Claim("Table 3: linear is the better text schedule", "e3", "schedule cosine", "discrimination", "lower"),
  Claim("Table 4: fusion helps", "e3", "without fusion", "discrimination", "lower"),
  Claim("Table 7: t_z = 1000 is better than 0", "e3", "timestep 0", "both", "lower"),
  Claim("Table 7: t_z = 1000 is better than 999", "e3", "timestep 999", "both", "lower"),
  Claim("Table 2 by top-1, on emoji", "e7", "target noise", "discrimination, no spatial pooling", "lower"),
  Claim("Table 3, on emoji", "e7", "schedule cosine", "discrimination, no spatial pooling", "lower"),
  Claim("Table 4, on emoji", "e7", "without fusion", "discrimination, no spatial pooling", "lower"),
  Claim("Table 7, on emoji: 1000 is better than 0", "e9", "timestep 0", "both", "lower"),
  Claim("Table 7, on emoji: 1000 is better than 999", "e9", "timestep 999", "both", "lower"),
  Claim("DiffDis classifies better than CLIP", "e4", "discrimination", "CLIP with parts", "higher"),
  Claim(
    "Table 8: so it does on long-tailed data, here on rare classes",
    "e5",
    "DiffDis, no low classes",
    "CLIP, no low classes",
    "higher",
  ),
  Claim("Table 1: augmentation makes the better CLIP", "e6", "paper", "openclip", "higher"),
)


def records_of(summary: Mapping[str, Any]) -> dict[str, Any]:
  """Return what is kept of a tables.json.

  Returns:
    records: `EXPERIMENT/ARM/COLUMN` -> a `records.Record`'s fields.
    settings: EXPERIMENT -> what its records have in common.
    runs: of each run, by name.
    claims: as the table has them.
  """
  (experiment, table), *_ = summary["tables"].items()
  settings = {"base": summary["base"], "seeds": summary["seeds"], **summary["provenance"]}
  found = {
    f"{experiment}/{row['label']}/{column}": {
      "what": f"{row['label']}: {summary['columns'][column]}",
      "unit": "%",
      "values": cell["values"],
      "of": {"settings": experiment, "runs": row["runs"]},
      "page": PAGE,
    }
    for row in table["rows"]
    for column, cell in row["cells"].items()
    if cell["n"]
  }
  runs = {
    name: {
      **{"minutes": run["minutes"], "start": run["start"], "objectives": [*run["config"]["objectives"]]},
      **(run["provenance"] or {}),
    }
    for name, run in summary["runs"].items()
  }
  return {"settings": {experiment: settings}, "records": found, "runs": runs, "claims": {experiment: summary["claims"]}}


def merged(there: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """Return the file's content with the records of another experiment, or in place of its older ones."""
  (experiment,) = new["settings"]
  kept = {name: each for name, each in there.get("records", {}).items() if not name.startswith(f"{experiment}/")}
  whole = {part: {**there.get(part, {}), **new[part]} for part in ("settings", "runs", "claims")}
  # A run that another experiment shares stays as that one has it: repeated elsewhere, it took other minutes.
  firsts = (run for each in kept.values() for run in each.get("of", {}).get("runs", ()))
  whole["runs"] |= {run: there["runs"][run] for first in firsts for run in _chain(there, first)}
  return {"about": ABOUT, **whole, "records": {**kept, **new["records"]}}


def stored() -> dict[str, Any]:
  """Return the file's content, without an experiment where there is no file."""
  empty: dict[str, Any] = {"settings": {}, "records": {}, "runs": {}, "claims": {}}
  return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else empty


# ---- the page's tables; `found` is as `stored` gives it


def claims(found: Mapping[str, Any]) -> str:
  """Return a table of every primary comparison."""
  rows = []
  for name, question in QUESTIONS.items():
    if name not in found["claims"]:
      rows.append((name.upper(), question, NOT_RUN, *[""] * (len(judging.HEADS) - 2)))
    for claim in found["claims"].get(name, ()):
      comparison, _, *others = judging.cells(claim)
      rows.append((name.upper(), comparison, title(found, name, claim["row"], claim["column"]), *others))
  return records.table(("", *judging.HEADS), rows)


def paper(found: Mapping[str, Any]) -> str:
  """Return a table of what of the paper is supported, refuted or open at this scale."""
  rows = []
  for claim in PAPER:
    compared = [
      each
      for each in found["claims"].get(claim.experiment, ())
      if (each["row"], each["base"]) == (claim.row, claim.base)
    ]
    verdict = compared[0]["verdict"] if compared else None
    said = judged(verdict["words"] if verdict else "undecided", claim.expected) if compared else NOT_RUN
    rows.append((claim.words, f"{claim.experiment.upper()}: {claim.row} − {claim.base}", claim.expected, said))
  return records.table(("the paper's claim", "tested by", "expected", "at this scale"), rows)


def judged(words: str, expected: str) -> str:
  """Judge the paper's claim by a verdict in words."""
  if words == "undecided":
    return "open"
  # A bound is no refutation: the paper's own effect may be smaller.
  kind = "supported" if expected in words else "bounded" if words.startswith("no effect") else "refuted"
  return f"{kind}: {words}"


def arms(found: Mapping[str, Any]) -> str:
  """Return mean and interval of every arm in the figures that are compared, and its minutes."""
  rows = []
  for arm in measured(found):
    mean = significance.paired(arm.values)  # of one sample, the same interval
    spread = "" if mean.low is None or mean.high is None else f" ± {(mean.high - mean.low) / 2:.1f}"
    minutes = "" if arm.minutes is None else f"{arm.minutes:.1f}"
    rows.append((arm.experiment.upper(), arm.name, arm.title, f"{mean.mean:.1f}{spread}", str(mean.n), minutes))
  heads = ("", "arm", "figure", "mean ± 95 % interval", "n", "minutes of training")
  return records.table(heads, rows) if rows else NOT_RUN.capitalize() + "."


def cost(found: Mapping[str, Any]) -> str:
  """Return runs and core-hours of each experiment, those that it shares with another in both."""
  rows = []
  for name in QUESTIONS:
    firsts = (run for arm in _arms(found, name) for run in arm["of"]["runs"])
    runs = dict.fromkeys(run for first in firsts for run in _chain(found, first))
    minutes = [found["runs"][run]["minutes"] for run in runs]
    hours = "" if None in minutes else f"{sum(minutes) / 60:.1f}"
    rows.append((name.upper(), str(len(runs)), hours) if runs else (name.upper(), NOT_RUN, ""))
  return records.table(("", "runs", "core-hours of training"), rows)


class Arm(NamedTuple):
  """A figure of an arm.

  Attributes:
    experiment, name, column, title: what of.
    values: of the seeds.
    minutes: of training, with what it started from but without the shared autoencoder; the median over seeds, or None
      where a run does not tell.
  """

  experiment: str
  name: str
  column: str
  title: str
  values: tuple[float, ...]
  minutes: float | None


def measured(found: Mapping[str, Any]) -> Iterator[Arm]:
  """Yield the arms that have a figure which their experiment compares."""
  for name in QUESTIONS:
    columns = dict.fromkeys(claim["column"] for claim in found["claims"].get(name, ()))
    for key, record in found["records"].items():
      experiment, label, column = key.split("/", 2)
      if experiment == name and column in columns:
        minutes = [_minutes(found, run) for run in record["of"]["runs"]]
        known = [each for each in minutes if each is not None]
        # Not the mean, of which a run that waits for its core would be most.
        median = statistics.median(known) if minutes and len(known) == len(minutes) else None
        values = tuple(record["values"].values())
        yield Arm(name, label, column, title(found, name, label, column), values, median)


def title(found: Mapping[str, Any], experiment: str, label: str, column: str) -> str:
  """Return the title of a column, from a record of it; else its name."""
  record = found["records"].get(f"{experiment}/{label}/{column}")
  return record["what"].removeprefix(f"{label}: ") if record else column


def has_verdicts(found: Mapping[str, Any]) -> bool:
  """Return whether a comparison has a seed that both of its arms have finished."""
  return any(claim["verdict"] for claims in found["claims"].values() for claim in claims)


def pictures(found: Mapping[str, Any]) -> str:
  """Return the figures, where there is something to show."""
  if not has_verdicts(found):
    return NOT_RUN.capitalize() + "."
  names = {"replication_forest": "Primary comparisons", "replication_minutes": "Accuracy over minutes of training"}
  return "\n\n".join(f"![{words}](../docs/figures/{name}.svg)" for name, words in names.items())


def _arms(found: Mapping[str, Any], experiment: str) -> list[Mapping[str, Any]]:
  return [record for name, record in found["records"].items() if name.startswith(f"{experiment}/")]


def _chain(found: Mapping[str, Any], run: str | None) -> Iterator[str]:
  """Yield a run and those that it started from."""
  while run:
    yield run
    run = found["runs"][run]["start"]


def _minutes(found: Mapping[str, Any], run: str) -> float | None:
  chain = [found["runs"][each] for each in _chain(found, run)]
  minutes = [each["minutes"] for each in chain if each["objectives"] != ["reconstruction"]]
  return None if None in minutes else sum(minutes)


def main(argv: Sequence[str]) -> None:
  del argv
  there = stored()
  files.write_json(FILE, merged(there, records_of(files.read_json(pathlib.Path(FLAGS.tables)))))


if __name__ == "__main__":
  flags.DEFINE_string("tables", None, "tables.json of `ablate table`", required=True)
  app.run(main)
