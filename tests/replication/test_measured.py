"""Test that the tables of README, results.md and the log contain the numbers of replication/measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from replication.measured import paired, records, replication, tables

pytestmark = pytest.mark.slow

SHAPES = [name for name, measured in paired.TABLES.items() if measured.topic == "shapes"]


def page(name: str) -> str:
  return (tables.ROOT / name).read_text(encoding="utf-8")


def table_of(name: str) -> list[list[str]]:
  """Return the rows of a table in README or results.md, without its head."""
  where, make = tables.PLACES[name]
  assert make() in page(where)
  return [line.strip("|").split("|") for line in make().splitlines()[2:]]


@pytest.mark.parametrize("name", tables.PAGES)
def test_a_page_says_what_the_records_hold(name):
  assert tables.written(name, page(name)) == page(name)


def test_no_number_of_the_results_stands_in_no_record():
  assert tables.unrecorded(page(tables.RESULTS)) == []


def test_none_of_65_differences_on_shapes_is_significant():
  """At two standard errors 14 differences would be bold; chance gives 11.9."""
  counts = [paired.table(name)["count"] for name in SHAPES]
  assert sum(count["differences"] for count in counts) == records.value("shapes", "differences") == 65
  assert sum(count["significant"] for count in counts) == 0
  assert sum(count["uncorrected"] for count in counts) == 5
  cells = [cell for name in SHAPES for row in paired.table(name)["rows"] for cell in row["cells"].values()]
  differences = [cell["difference"] for cell in cells if cell["difference"]]
  assert sum(abs(difference["mean"]) >= 2 * difference["se"] for difference in differences) == 14
  assert 65 * 2 * stats.t.sf(2, 2) == pytest.approx(11.9, abs=0.05)


def accuracy_of(start: str) -> np.ndarray:
  """Read top-1 on `val_vendor` by seed, in per cent, directly from the file."""
  runs = records.read("emoji")["runs"]
  return np.array(
    [100 * runs[f"{start}-seed_{seed}"]["metrics"]["zero_shot"]["val_vendor"][1]["acc1"] for seed in (0, 1, 2)]
  )


def test_a_difference_on_a_page_is_that_of_its_runs():
  """Compute how much generation first gains on `val_vendor`, without the project's code."""
  first = accuracy_of("generation_first_discrimination_1800")
  none = accuracy_of("held_temperature_discrimination_1800_epyc")
  test = stats.ttest_rel(first, none)
  low, high = test.confidence_interval(0.95)
  mean = (first - none).mean()
  assert f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], p {test.pvalue:.3f}, " in page(paired.EMOJI_LOG)


def holm(p_values):
  """Compute Holm's adjusted p by its definition."""
  order = np.argsort(p_values)
  adjusted = np.maximum.accumulate([(len(order) - i) * p_values[place] for i, place in enumerate(order)])
  return dict(zip(order.tolist(), np.minimum(adjusted, 1.0), strict=True))


@pytest.mark.parametrize("line, claim", [*enumerate(replication.PAPER)])
def test_a_claim_of_the_paper_is_decided_by_its_runs(line, claim):
  """Compute differences and verdicts from each arm's values without the project's code."""
  archive, differences, p_values = json.loads(replication.FILE.read_text()), [], []
  for look in claim.looks:
    named = archive["claims"][look.experiment]
    arms = lambda pair, look=look: (
      [*archive["records"][f"{look.experiment}/{pair[side]}/{pair['column']}"]["values"].values()]
      for side in ("row", "base")
    )
    tests = [stats.ttest_rel(*arms(pair)) for pair in named]
    (place,) = (i for i, pair in enumerate(named) if (pair["row"], pair["base"]) == (look.row, look.base))
    p_values.append(holm([test.pvalue for test in tests])[place])
    differences.append(tests[place].confidence_interval(0.95))
  corrected, row = holm(p_values), table_of("the paper's claims")[line]
  assert row[0] == claim.words
  for i, (look, (low, high)) in enumerate(zip(claim.looks, differences, strict=True)):
    cell = row[1 + replication.TESTBEDS.index(look.testbed)]
    figures = f" ({look.experiment.upper()}: {(low + high) / 2:+.1f} ± {(high - low) / 2:.1f})".replace("-", "−")
    text = cell.split(figures.replace("+0.0", "0.0").replace("−0.0", "0.0"))[0].split("; ")[-1]
    direction = "higher" if low + high > 0 else "lower"
    kind = "supported" if direction == claim.expected else "refuted"
    assert text.startswith(f"{kind}: {direction}") == (corrected[i] < 0.05)
    assert corrected[i] < 0.05 or text in ("open", replication.COARSE) or text.startswith("bounded: no effect larger")


@pytest.mark.parametrize(
  "words, row, base",
  [
    ("Table 2", "text target: noise", "text target: data"),
    ("Table 3", "text schedule: cosine", "text schedule: linear"),
    ("Table 4", "fusion off", "fusion on (the model)"),
    ("Table 7", "t_z = 0", "t_z = 1000"),
    ("Table 7", "t_z = 999", "t_z = 1000"),
  ],
)
def test_what_is_called_a_claim_of_the_paper_is_so_in_its_table(words, row, base):
  """The claim's table supports it at least by top-1. If FID or R@1 disagree, the page names top-1."""
  claims = [claim for claim in replication.PAPER if words in claim.words]
  assert len(claims) == 1 and {look.testbed for look in claims[0].looks} == {*replication.TESTBEDS}
  number = claims[0].words.partition(" ")[2][0]
  one, other = (records.record("paper", f"table {number}/{name}").values for name in (row, base))
  better = {"ZS": other["ZS"] > one["ZS"], "FID": other["FID"] < one["FID"], "R@1": other["R@1"] >= one["R@1"]}
  for claim in claims:
    assert claim.expected == "lower" and better["ZS"]
    assert all(better.values()) != ("by top-1" in claim.words)


@pytest.mark.parametrize(
  "line, arms, column, is_sure",
  [
    (1, ("e8/both", "e8/discrimination"), "val_vendor/acc1", False),
    (1, ("e1/both", "e1/generation"), "test_unseen_generated/acc1_attributes", True),
    (2, ("e4/discrimination", "e4/CLIP with parts"), "val_vendor/acc1", False),
    (2, ("e5/DiffDis, no low classes", "e5/CLIP, no low classes"), "test/acc_low", True),
  ],
)
def test_a_comparison_of_the_replication_in_readme_is_that_of_its_runs(line, arms, column, is_sure):
  records_of = json.loads(replication.FILE.read_text())["records"]
  one, other = ([*records_of[f"{arm}/{column}"]["values"].values()] for arm in arms)
  test = stats.ttest_rel(one, other)
  low, high = test.confidence_interval(0.95)
  points = f"{np.mean(one) - np.mean(other):+.1f} ± {(high - low) / 2:.1f} points".replace("-", "−")
  *_, answer, n = table_of("shown")[line]
  assert points in answer and n == "5" and (4 * test.pvalue < 0.05) == is_sure


@pytest.mark.parametrize("topic", [path.stem for path in sorted(records.HERE.glob("*.json"))])
def test_every_record_says_what_it_is_and_where_it_stands(topic):
  for name, record in records.load(topic).items():
    assert record.what and (record.values or record.mean is not None), name
    assert record.page.startswith("paper") or (tables.ROOT / record.page).exists(), name
