"""README's table, results.md and the tables of the log say what the records in replication/measured hold."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy import stats

from replication.measured import paired, records, replication, tables

pytestmark = pytest.mark.slow

SHAPES = [name for name, measured in paired.TABLES.items() if measured.topic == "shapes"]
LOG = sorted(path for path in (tables.ROOT / "replication/log").glob("*.md") if path.name != "index.md")


def page(name: str) -> str:
  return (tables.ROOT / name).read_text(encoding="utf-8")


def table_of(name: str) -> list[list[str]]:
  """The rows of a table of README or results.md, without its head."""
  where, make = tables.PLACES[name]
  assert make() in page(where)
  return [line.strip("|").split("|") for line in make().splitlines()[2:]]


@pytest.mark.parametrize("name", tables.PAGES)
def test_a_page_says_what_the_records_hold(name):
  assert tables.written(name, page(name)) == page(name)


def test_no_number_of_the_results_stands_in_no_record():
  assert tables.unrecorded(page(tables.RESULTS)) == []


def test_readmes_results_are_one_table_of_five_rows_by_the_script():
  text = page(tables.README)
  (shown,) = re.findall(r"^## What was shown$(.*?)^## ", text, re.M | re.S)
  assert tables.unrecorded(shown) == []
  assert len(re.findall(r"^\|", shown, re.M)) - 2 == len(table_of("shown")) <= 5


def test_a_number_that_differs_from_its_record_is_written_again():
  said = "<!--=demo/classes-->63<!--=-->"
  assert tables._INLINE.search(said)
  results = page(tables.RESULTS)
  changed = results.replace("<!--=demo/classes-->64<!--=-->", said).replace("|95.1 ± 1.6 %|", "|95.2 ± 1.6 %|")
  assert changed != results and tables.written(tables.RESULTS, changed) == results


def test_of_65_differences_on_shapes_none_survives():
  """At two standard errors 14 are bold, and chance gives 11.9."""
  counts = [paired.table(name)["count"] for name in SHAPES]
  assert sum(count["differences"] for count in counts) == records.value("shapes", "differences") == 65
  assert sum(count["significant"] for count in counts) == 0
  assert sum(count["uncorrected"] for count in counts) == 5
  cells = [cell for name in SHAPES for row in paired.table(name)["rows"] for cell in row["cells"].values()]
  differences = [cell["difference"] for cell in cells if cell["difference"]]
  assert sum(abs(each["mean"]) >= 2 * each["se"] for each in differences) == 14
  assert 65 * 2 * stats.t.sf(2, 2) == pytest.approx(11.9, abs=0.05)


def accuracy_of(start: str) -> np.ndarray:
  """Top-1 on `val_vendor` by seed, in per cent, from the file itself."""
  runs = records.read("emoji")["runs"]
  return np.array(
    [100 * runs[f"{start}-seed_{seed}"]["metrics"]["zero_shot"]["val_vendor"][1]["acc1"] for seed in (0, 1, 2)]
  )


def test_a_difference_on_a_page_is_that_of_its_runs():
  """Generation first, `val_vendor`, computed without the project's code."""
  first = accuracy_of("generation_first_discrimination_1800")
  none = accuracy_of("held_temperature_discrimination_1800_epyc")
  test = stats.ttest_rel(first, none)
  low, high = test.confidence_interval(0.95)
  mean = (first - none).mean()
  assert f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], p {test.pvalue:.3f}, " in page(paired.EMOJI_LOG)


def holm(p_values):
  """Holm's adjusted p, by statsmodels' definition written out."""
  order = np.argsort(p_values)
  adjusted = np.maximum.accumulate([(len(order) - i) * p_values[place] for i, place in enumerate(order)])
  return dict(zip(order.tolist(), np.minimum(adjusted, 1.0), strict=True))


@pytest.mark.parametrize("line, claim", [*enumerate(replication.PAPER)])
def test_a_claim_of_the_paper_is_decided_by_its_runs(line, claim):
  """Differences and verdicts, computed without the project's code from each arm's values."""
  found, differences, p_values = json.loads(replication.FILE.read_text()), [], []
  for look in claim.looks:
    named = found["claims"][look.experiment]
    arms = lambda each, look=look: (
      [*found["records"][f"{look.experiment}/{each[side]}/{each['column']}"]["values"].values()]
      for side in ("row", "base")
    )
    tests = [stats.ttest_rel(*arms(each)) for each in named]
    (place,) = (i for i, each in enumerate(named) if (each["row"], each["base"]) == (look.row, look.base))
    p_values.append(holm([test.pvalue for test in tests])[place])
    differences.append(tests[place].confidence_interval(0.95))
  corrected, row = holm(p_values), table_of("the paper's claims")[line]
  assert row[0] == claim.words
  for i, (look, (low, high)) in enumerate(zip(claim.looks, differences, strict=True)):
    cell = row[1 + replication.TESTBEDS.index(look.testbed)]
    said = f" ({look.experiment.upper()}: {(low + high) / 2:+.1f} ± {(high - low) / 2:.1f})".replace("-", "−")
    text = cell.split(said.replace("+0.0", "0.0").replace("−0.0", "0.0"))[0].split("; ")[-1]
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
  """In its top-1 at least, which is what is compared; where FID or R@1 say otherwise, the page says by what."""
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


def test_a_mean_on_a_page_is_that_of_its_seeds():
  """Unseen pairs of the demo. Two processors' runs of one seed are not independent, and count once."""
  runs = [[*records.record("demo", f"unseen/{cpu}").values.values()] for cpu in ("epyc", "xeon")]
  values = np.mean(runs, axis=0)
  half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / np.sqrt(4)
  assert table_of("accuracy of the demo")[1] == ["top-1, unseen pairs", f"{np.mean(values):.1f} ± {half:.1f} %", "4"]


def test_runs_have_what_evaluate_wrote():
  found = records.results("emoji")["both-seed_0"]["zero_shot"]["val_concepts"]
  assert found["dataset"] == "val_concepts" and found["task"] == "zeroshot_classification"
  assert found["metrics"]["acc1"] == 0.0845442536327609
  assert (found["protocol"]["num_noise_samples"], found["protocol"]["checkpoint"]) == (4, 1800)
  assert len(records.results("emoji")) == 69 and len(records.results("shapes")) == 42


@pytest.mark.parametrize("topic", [path.stem for path in sorted(records.HERE.glob("*.json"))])
def test_every_record_says_what_it_is_and_where_it_stands(topic):
  for name, found in records.load(topic).items():
    assert found.what and (found.values or found.mean is not None), name
    assert found.page.startswith("paper") or (tables.ROOT / found.page).exists(), name


def test_the_index_of_the_log_has_every_entry():
  """As mkdocs makes the anchors of headings."""
  index = page("replication/log/index.md")
  for path in LOG:
    for date, title in re.findall(r"^## (\S+): (.*)$", path.read_text(encoding="utf-8"), re.M):
      anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", f"{date} {title}".lower()))
      assert f"| {date} | [{title}]({path.name}#{anchor}) |" in index
