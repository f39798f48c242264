"""Store the results of an experiment of replication/protocol.md, and make the tables of replication/index.md.

  python -m replication.measured.replication --tables=runs/e1/tables.json

writes the metrics of every arm by seed into replication.json beside this file. It also stores where they come from: the
provenance, and each run's config hash, seed, steps, minutes and starts. Then `python -m replication.measured.tables`
writes the page's tables, and `make figures` draws its figures.
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
COARSE = "testbed cannot decide"  # undecided, with a minimum detectable effect of more than twice the bound
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


class Look(NamedTuple):
  """A comparison that tests a claim: `row` − `base`, on one of TESTBEDS."""

  testbed: str
  experiment: str
  row: str
  base: str


class Claim(NamedTuple):
  """A claim of the paper: the differences of its looks should be `expected`.

  `words` name the metric if the paper's own metrics disagree.
  """

  words: str
  expected: str
  looks: tuple[Look, ...]


TESTBEDS = ("rendered images", "emoji")
POOLING = "discrimination, no spatial pooling"
UNREAD = "varies a quantity that the network does not read"


def _on_both(row: str, base: str = "discrimination") -> tuple[Look, ...]:
  return Look(TESTBEDS[0], "e3", row, base), Look(TESTBEDS[1], "e7", row, POOLING)


PAPER = (
  Claim(
    "joint training helps discrimination",
    "higher",
    tuple(Look(*where, "both", "discrimination") for where in zip(TESTBEDS, ("e1", "e8"), strict=True)),
  ),
  Claim(
    "joint training helps generation (attributes; hardly an image is right)",
    "higher",
    (Look(TESTBEDS[0], "e1", "both", "generation"),),
  ),
  Claim(
    "a trained generator is a good start",
    "higher",
    (Look(TESTBEDS[1], "e2", "discrimination after generation", "discrimination"),),
  ),
  Claim("Table 2: data is the better text target by top-1", "lower", _on_both("target noise")),
  Claim(f"Table 3: linear is the better text schedule ({UNREAD})", "lower", _on_both("schedule cosine")),
  Claim("Table 4: fusion helps", "lower", _on_both("without fusion")),
  Claim("Table 5: by FID, a feed-forward network of the text's own helps", "lower", _on_both("shared FFN")),
  Claim(
    "Table 7: t_z = 1000 is better than 0 and 999",
    "lower",
    tuple(
      Look(testbed, experiment, f"timestep {t_z}", "both")
      for testbed, experiment in zip(TESTBEDS, ("e3", "e9"), strict=True)
      for t_z in (0, 999)
    ),
  ),
  Claim(
    "DiffDis classifies better than CLIP",
    "higher",
    (Look(TESTBEDS[1], "e4", "discrimination", "CLIP with parts"),),
  ),
  Claim(
    "Table 8: so it does on long-tailed data, here on rare classes",
    "higher",
    (Look(TESTBEDS[0], "e5", "DiffDis, no low classes", "CLIP, no low classes"),),
  ),
  Claim("Table 1: augmentation makes the better CLIP", "higher", (Look(TESTBEDS[1], "e6", "paper", "openclip"),)),
)


def records_of(summary: Mapping[str, Any]) -> dict[str, Any]:
  """Return the part of a tables.json that is stored.

  Returns:
    records: `EXPERIMENT/ARM/COLUMN` -> a `records.Record`'s fields.
    settings: EXPERIMENT -> what its records have in common.
    runs: name of a run -> its minutes, start, objectives and provenance.
    claims: EXPERIMENT -> the claims of the table.
  """
  (experiment, table), *_ = summary["tables"].items()
  settings = {"base": summary["base"], "seeds": summary["seeds"], **summary["provenance"]}
  figures = {
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
  claims = {experiment: summary["claims"]}
  return {"settings": {experiment: settings}, "records": figures, "runs": runs, "claims": claims}


def merged(archive: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """Return the file's content with an experiment's records added, or replaced if it had older ones."""
  (experiment,) = new["settings"]
  remaining = {
    name: fields for name, fields in archive.get("records", {}).items() if not name.startswith(f"{experiment}/")
  }
  updated = {part: {**archive.get(part, {}), **new[part]} for part in ("settings", "runs", "claims")}
  # A run that two experiments share keeps the minutes of the first: run again elsewhere, it took another time.
  firsts = (run for fields in remaining.values() for run in fields.get("of", {}).get("runs", ()))
  updated["runs"] |= {run: archive["runs"][run] for first in firsts for run in _chain(archive, first)}
  return {"about": ABOUT, **updated, "records": {**remaining, **new["records"]}}


def stored() -> dict[str, Any]:
  """Return the file's content, or one without experiments if there is no file."""
  empty: dict[str, Any] = {"settings": {}, "records": {}, "runs": {}, "claims": {}}
  return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else empty


# ---- the page's tables; `archive` is the content that `stored` returns


def claims(archive: Mapping[str, Any]) -> str:
  """Return the tables of the primary comparisons of each experiment."""
  rows: dict[str, list[Sequence[str]]] = {name: [] for name in QUESTIONS}
  for name, compared in archive["claims"].items():
    for claim in compared:
      comparison, verdict, _, *numbers = judging.cells(claim)
      if claim["row"].startswith(("gamma", "schedule")):
        verdict += f"; {UNREAD}"
      rows[name].append((comparison, verdict, title(archive, name, claim["row"], claim["column"]), *numbers))
  return _by_experiment(judging.HEADS, rows)


def _by_experiment(heads: Sequence[str], rows: Mapping[str, Sequence[Sequence[str]]]) -> str:
  """Return the tables of each experiment below its question. Each metric has a table of its own; its title, the third
  column of the rows, is above the table."""
  parts = []
  for name, lines in rows.items():
    parts.append(f"**{name.upper()}: {QUESTIONS[name]}**" + ("" if lines else f" {NOT_RUN.capitalize()}."))
    for measured_as in dict.fromkeys(line[2] for line in lines):
      head, *kept = [(*line[:2], *line[3:]) for line in (heads, *lines) if line is heads or line[2] == measured_as]
      parts.append(f"{measured_as}:\n\n{records.table(head, kept)}")
  return "\n\n".join(parts)


def paper(archive: Mapping[str, Any]) -> str:
  """Return a table of the paper's claims, with the verdict on each testbed: supported, refuted, bounded or open."""
  rows = []
  for claim in PAPER:
    differences = dict.fromkeys(
      f"{look.row} − {look.base.removesuffix(', no spatial pooling')}" for look in claim.looks
    )
    cells: dict[str, list[str]] = {testbed: [] for testbed in TESTBEDS}
    for look, text in zip(claim.looks, looked(claim, archive), strict=True):
      cells[look.testbed].append(text)
    rows.append((claim.words, *("; ".join(cells[testbed]) for testbed in TESTBEDS), "; ".join(differences)))
  return records.table(("the paper's claim", *TESTBEDS, "points of"), rows)


def looked(claim: Claim, archive: Mapping[str, Any]) -> list[str]:
  """Return the judgement, experiment and difference of each look of a claim.

  Holm's correction counts the looks as well, since a question that is asked twice has two chances.
  """
  verdicts = [_verdict_of(look, archive) for look in claim.looks]
  decided = [verdict for verdict in verdicts if verdict]
  p_values = significance.holm([verdict["difference"]["p_holm"] for verdict in decided], named=len(verdicts))
  p_bounds = significance.holm([verdict["p_equivalent_holm"] for verdict in decided], named=len(verdicts))
  corrected = iter(zip(p_values, p_bounds, strict=True))
  texts = []
  for look, verdict in zip(claim.looks, verdicts, strict=True):
    experiment = look.experiment.upper()
    if verdict is None:
      texts.append(f"{NOT_RUN} ({experiment})")
      continue
    difference = verdict["difference"]
    words = judging.in_words(difference["mean"], *next(corrected), verdict["bound"])
    too_coarse = (difference["detectable"] or 0) > 2 * verdict["bound"]
    text = COARSE if words == "undecided" and too_coarse else judged(words, claim.expected)
    half = ((difference["high"] or 0) - (difference["low"] or 0)) / 2
    texts.append(f"{text} ({experiment}: {records.interval(difference['mean'], half, sign='+')})")
  return texts


def _verdict_of(look: Look, archive: Mapping[str, Any]) -> Mapping[str, Any] | None:
  claims_of_experiment = archive["claims"].get(look.experiment, ())
  compared = [claim for claim in claims_of_experiment if (claim["row"], claim["base"]) == (look.row, look.base)]
  return compared[0]["verdict"] if compared else None


def judged(words: str, expected: str) -> str:
  """Judge the paper's claim by a verdict in words."""
  if words == "undecided":
    return "open"
  # A bound is not a refutation: the paper's own effect may be smaller.
  kind = "supported" if expected in words else "bounded" if words.startswith("no effect") else "refuted"
  return f"{kind}: {words}"


def arms(archive: Mapping[str, Any]) -> str:
  """Return a table of each experiment: mean and interval of every compared metric of an arm, and the arm's minutes."""
  rows: dict[str, list[Sequence[str]]] = {}
  for arm in measured(archive):
    mean = significance.paired(arm.values)  # the interval of one sample is computed in the same way
    spread = "" if mean.low is None or mean.high is None else f" ± {(mean.high - mean.low) / 2:.1f}"
    minutes = "" if arm.minutes is None else f"{arm.minutes:.1f}"
    row = (arm.name, f"{mean.mean:.1f}{spread}", arm.title, str(mean.n), minutes)
    rows.setdefault(arm.experiment, []).append(row)
  heads = ("arm", "mean ± 95 % interval", "figure", "n", "minutes of training")
  return _by_experiment(heads, rows) if rows else NOT_RUN.capitalize() + "."


def cost(archive: Mapping[str, Any]) -> str:
  """Return the runs and core-hours of each experiment. Shared runs count in both experiments."""
  rows = []
  for name in QUESTIONS:
    firsts = (run for arm in _arms(archive, name) for run in arm["of"]["runs"])
    runs = dict.fromkeys(run for first in firsts for run in _chain(archive, first))
    minutes = [archive["runs"][run]["minutes"] for run in runs]
    hours = "" if None in minutes else f"{sum(minutes) / 60:.1f}"
    rows.append((name.upper(), str(len(runs)), hours) if runs else (name.upper(), NOT_RUN, ""))
  return records.table(("", "runs", "core-hours of training"), rows)


class Arm(NamedTuple):
  """The compared metric of an arm.

  Attributes:
    experiment, name, column, title: the experiment, the arm, and the key and title of the metric.
    values: values of the seeds.
    minutes: median over seeds of the minutes of training, including the run that it started from, but not the shared
      autoencoder; None if a run has none.
  """

  experiment: str
  name: str
  column: str
  title: str
  values: tuple[float, ...]
  minutes: float | None


def measured(archive: Mapping[str, Any]) -> Iterator[Arm]:
  """Yield the metrics that an experiment compares, for each of its arms."""
  for name in QUESTIONS:
    columns = dict.fromkeys(claim["column"] for claim in archive["claims"].get(name, ()))
    for key, record in archive["records"].items():
      experiment, label, column = key.split("/", 2)
      if experiment == name and column in columns:
        minutes = [_minutes(archive, run) for run in record["of"]["runs"]]
        recorded = [value for value in minutes if value is not None]
        # The median, since a run that waited for its core would dominate a mean.
        median = statistics.median(recorded) if minutes and len(recorded) == len(minutes) else None
        values = tuple(record["values"].values())
        yield Arm(name, label, column, title(archive, name, label, column), values, median)


def title(archive: Mapping[str, Any], experiment: str, label: str, column: str) -> str:
  """Return the title of a column from its record, or else its name."""
  record = archive["records"].get(f"{experiment}/{label}/{column}")
  return record["what"].removeprefix(f"{label}: ") if record else column


def has_verdicts(archive: Mapping[str, Any]) -> bool:
  """Return whether both arms of some comparison have finished a seed."""
  return any(claim["verdict"] for claims in archive["claims"].values() for claim in claims)


def pictures(archive: Mapping[str, Any]) -> str:
  """Return links to the figures, if there is something to show."""
  if not has_verdicts(archive):
    return NOT_RUN.capitalize() + "."
  names = {"replication_forest": "Primary comparisons", "replication_minutes": "Accuracy over minutes of training"}
  return "\n\n".join(f"![{words}](../docs/figures/{name}.svg)" for name, words in names.items())


def _arms(archive: Mapping[str, Any], experiment: str) -> list[Mapping[str, Any]]:
  return [record for name, record in archive["records"].items() if name.startswith(f"{experiment}/")]


def _chain(archive: Mapping[str, Any], run: str | None) -> Iterator[str]:
  """Yield a run and the runs that it started from."""
  while run:
    yield run
    run = archive["runs"][run]["start"]


def _minutes(archive: Mapping[str, Any], run: str) -> float | None:
  chain = [archive["runs"][name] for name in _chain(archive, run)]
  minutes = [link["minutes"] for link in chain if link["objectives"] != ["reconstruction"]]
  return None if None in minutes else sum(minutes)


def main(argv: Sequence[str]) -> None:
  del argv
  content = stored()
  files.write_json(FILE, merged(content, records_of(files.read_json(pathlib.Path(FLAGS.tables)))))


if __name__ == "__main__":
  flags.DEFINE_string("tables", None, "tables.json of `ablate table`", required=True)
  app.run(main)
