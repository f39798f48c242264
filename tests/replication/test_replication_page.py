"""Test the tables and figures of replication/index.md on invented records."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from scipy import stats

from replication import claims as judging
from replication.figures import forest, plots
from replication.measured import replication

pytestmark = pytest.mark.slow

COLUMN = "test_unseen/acc1"
FIGURES = {
  "both": (54.0, 55.5, 56.0, 54.5, 55.0),
  "discrimination": (50.0, 51.0, 51.0, 50.5, 52.0),
  "discrimination as long as both": (54.5, 55.0, 56.2, 54.1, 55.4),
}


@pytest.fixture(scope="module")
def archive() -> dict[str, Any]:
  """Return two comparisons of e1 as in replication.json. Each arm starts from a generation run of 2 min."""
  bases = [name for name in FIGURES if name != "both"]
  pairs = [[a - b for a, b in zip(FIGURES["both"], FIGURES[base], strict=True)] for base in bases]
  verdicts = judging.verdicts(pairs, [3.0, 3.0])
  claims = [
    {"row": "both", "base": base, "column": COLUMN, "bound": 3.0, "values": {}, "verdict": dataclasses.asdict(verdict)}
    for base, verdict in zip(bases, verdicts, strict=True)
  ]
  records, runs = {}, {"autoencoder": dict(minutes=9.0, start=None, objectives=["reconstruction"])}
  for place, (name, values) in enumerate(FIGURES.items()):
    names = [f"{name}-{seed}" for seed in range(5)]
    runs[f"{name}, start"] = dict(minutes=2.0, start="autoencoder", objectives=["generation"])
    runs |= {run: dict(minutes=4.0 + place, start=f"{name}, start", objectives=["discrimination"]) for run in names}
    by_seed = {str(seed): value for seed, value in enumerate(values)}
    records[f"e1/{name}/{COLUMN}"] = dict(what=f"{name}: choice of five ↑", values=by_seed, of=dict(runs=names))
    records[f"e1/{name}/held_out/x"] = dict(what=f"{name}: not compared", values=by_seed, of=dict(runs=names))
  return {"settings": {}, "records": records, "runs": runs, "claims": {"e1": claims}}


def rows(text: str) -> list[list[str]]:
  """Return the rows of all tables in a text, without their heads."""
  tables = re.findall(r"^\|.*\n\|---.*\n((?:\|.*\n?)*)", text, re.M)
  return [line.split("|")[1:-1] for table in tables for line in table.splitlines()]


def test_a_comparison_has_effect_interval_p_and_verdict(archive):
  text = replication.claims(archive)
  first, second = rows(text)
  test = stats.ttest_rel(FIGURES["both"], FIGURES["discrimination"])
  low, high = test.confidence_interval(0.95)
  mean = sum(FIGURES["both"]) / 5 - sum(FIGURES["discrimination"]) / 5
  assert first[:3] == ["both − discrimination", "higher", f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"]
  assert first[3] == "5" and first[6] == "3"
  assert second[1] == "no effect larger than 3"
  assert text.startswith("**E1: do the two tasks help each other?**\n\nchoice of five ↑:\n\n|comparison|verdict|diff")
  missing = re.findall(r"^\*\*(\w+): .*\*\* Not run yet\.$", text, re.M)
  assert missing == ["E2", "E3", "E4", "E5", "E6", "E7", "E8", "E9", "E10", "E10_EMOJI"]


def test_a_claim_of_the_paper_is_judged_by_its_comparisons(archive):
  """The correction counts both experiments: p = 0.03 in each is not significant, since the limit is 0.025."""
  table = rows(replication.paper(archive))
  words, rendered, emoji, points = table[0]
  assert (words, points) == ("joint training helps discrimination", "both − discrimination")
  assert rendered.startswith("supported: higher") and emoji == "not run yet (E8)"
  verdicts = {text.partition(" (")[0] for row in table[2:] for cell in row[1:3] for text in cell.split("; ")}
  assert len(table) == 11 and verdicts == {"not run yet", ""}


@pytest.mark.parametrize(
  "words, expected, verdict",
  [
    ("higher", "higher", "supported: higher"),
    ("higher, no effect larger than 3", "higher", "supported: higher, no effect larger than 3"),
    ("lower", "higher", "refuted: lower"),
    ("no effect larger than 3", "lower", "bounded: no effect larger than 3"),
    ("higher, no effect larger than 3", "lower", "refuted: higher, no effect larger than 3"),
    ("undecided", "higher", "open"),
  ],
)
def test_a_verdict_supports_refutes_or_leaves_open(words, expected, verdict):
  assert replication.judged(words, expected) == verdict


def test_arms_have_minutes_with_their_start_and_without_the_autoencoder(archive):
  table = rows(replication.arms(archive))
  assert [row[0] for row in table] == [*FIGURES] and [row[-1] for row in table] == ["6.0", "7.0", "8.0"]
  half = stats.t.ppf(0.975, 4) * stats.tstd(FIGURES["both"]) / 5**0.5
  assert table[0][1:3] == [f"{sum(FIGURES['both']) / 5:.1f} ± {half:.1f}", "5"]


def test_costs_count_each_run_once(archive):
  first, second, *_ = rows(replication.cost(archive))
  hours = (9 + 3 * 2 + 5 * (4 + 5 + 6)) / 60
  assert first == ["E1", "19", f"{hours:.1f}"] and second == ["E2", "not run yet", ""]


def test_a_run_that_experiments_share_keeps_the_minutes_of_the_first(archive):
  """A second run on a busy machine has the same results but takes other minutes."""
  runs = {name: {**run, "minutes": None} for name, run in archive["runs"].items() if "both" in name}
  base = {**archive["records"][f"e1/both/{COLUMN}"]}
  new = {"settings": {"e3": {}}, "records": {f"e3/both/{COLUMN}": base}, "runs": {"autoencoder": {}, **runs}}
  merged = replication.merged(archive, {**new, "claims": {"e3": []}})
  assert merged["runs"] == archive["runs"] and merged["records"][f"e3/both/{COLUMN}"] == base
  again = replication.merged(merged, {**new, "settings": {"e1": {}}, "records": {}, "claims": {"e1": []}})
  assert again["runs"]["both-0"]["minutes"] == 4.0, "since e3 has it too"


def test_the_forest_has_the_intervals_and_the_minutes_have_the_seeds(archive):
  differences = [claim["verdict"]["difference"] for claim in archive["claims"]["e1"] if claim["verdict"]]
  lines = forest.replication_forest(archive).figure.axes[0].lines
  assert {x for line in lines for x in line.get_xdata()} >= {
    difference[key] for difference in differences for key in ("mean", "low")
  }
  seeds, _ = plots.replication_minutes(archive).figure.axes[0].lines
  assert len(seeds.get_xdata()) == 15
