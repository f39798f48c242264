"""Compare the cells of tables of made-up results with numbers computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from diffdis_jax.ablate import run as running
from diffdis_jax.ablate import summary, tables
from diffdis_jax.ablate.run import Folder, State
from diffdis_jax.errors import UserError
from tests.ablate.synthetic import base, make_plan, write


def difference_of(values, base):
  """Return the cell of a row with these values, in a table whose second row is the base."""
  cells, against = summary.cells_of([{"top-1": values}, {"top-1": base}], base=1)
  assert against["top-1"]["difference"] is None
  return cells["top-1"]


def test_a_cell_equals_one_computed_by_hand():
  """Values 90, 92, 97 have mean 93 and variance (9 + 1 + 16) / 2 = 13. Their differences to 88, 91, 91 are 2, 1, 6,
  with mean 3, variance (1 + 4 + 9) / 2 = 7 and standard error sqrt(7 / 3) = 1.5275; 4.3027 times that, t(0.975, 2), is
  6.572."""
  cell = difference_of({0: 90.0, 1: 92.0, 2: 97.0}, {0: 88.0, 1: 91.0, 2: 91.0})
  assert cell["values"] == {"0": 90.0, "1": 92.0, "2": 97.0}
  assert (cell["mean"], cell["n"]) == (93.0, 3) and math.isclose(cell["sd"], math.sqrt(13))
  difference = cell["difference"]
  assert difference["mean"] == 3.0 and math.isclose(difference["se"], math.sqrt(7 / 3))
  np.testing.assert_allclose([difference["low"], difference["high"]], [3 - 6.572, 3 + 6.572], atol=1e-3)
  assert difference["p_holm"] == difference["p"] > 0.05 and not difference["is_significant"]


@pytest.mark.parametrize(
  "values, other, difference",
  [
    # Five standard errors from zero; with one degree of freedom, p is 1 in 8.
    ({0: 5.0, 1: 7.0}, {0: 2.0, 1: 5.0}, {"mean": 2.5, "se": 0.5, "n": 2, "is_significant": False}),
    # Only seeds of both rows make pairs.
    ({0: 5.0, 1: 7.0}, {1: 5.0, 2: 100.0}, {"mean": 2.0, "se": None, "n": 1, "p": None, "is_significant": False}),
    # The difference is the same for every seed, so no variance can be estimated.
    ({0: 5.0, 1: 6.0}, {0: 5.0, 1: 6.0}, {"mean": 0.0, "se": 0.0, "n": 2, "p": None, "is_significant": False}),
    ({0: 5.0, 1: 6.0}, {0: 4.0, 1: 5.0}, {"mean": 1.0, "se": 0.0, "n": 2, "p": None, "is_significant": False}),
    (
      {0: 5.0, 1: 7.0, 2: 6.0},
      {0: 3.0, 1: 5.1, 2: 3.9},
      {"mean": pytest.approx(2.0), "n": 3, "is_significant": True},
    ),
  ],
)
def test_differences_are_paired_by_seed(values, other, difference):
  assert difference.items() <= difference_of(values, other)["difference"].items()


@pytest.mark.parametrize("values, other", [({0: 5.0}, {}), ({}, {0: 5.0}), ({0: 5.0}, {1: 5.0})])
def test_rows_without_a_common_seed_have_no_difference(values, other):
  assert difference_of(values, other)["difference"] is None


def test_holms_correction_is_over_all_cells_of_a_table():
  """Three rows and two columns have four differences to the base row; their p-values equal scipy's."""
  rng = np.random.default_rng(0)
  figures = [{name: dict(enumerate(rng.normal(size=4).tolist())) for name in ("a", "b")} for _ in range(3)]
  cells = summary.cells_of(figures, base=1)
  differences = [cells[place][name]["difference"] for place in (0, 2) for name in ("a", "b")]
  pairs = [([*figures[place][name].values()], [*figures[1][name].values()]) for place in (0, 2) for name in ("a", "b")]
  p = [stats.ttest_rel(ours, base).pvalue for ours, base in pairs]
  np.testing.assert_allclose([difference["p"] for difference in differences], p)
  smallest = int(np.argmin(p))
  np.testing.assert_allclose(differences[smallest]["p_holm"], min(1.0, 4 * p[smallest]))


def summarised(plan, folder):
  return summary.summarise(plan, folder, base="tests/tiny.py")


@pytest.fixture
def measured(tmp_path):
  """Write the results of Table 4 with three seeds. The row without fusion has no third run and an unfinished second
  one."""
  plan, folder = make_plan(names=["4"]), Folder(tmp_path)
  for seed, run in enumerate(plan.rows["4", 1]):
    write(folder, run, {"test": 0.9 + seed / 100, "generated": 1.0})
  off = plan.rows["4", 0]
  write(folder, off[0], {"test": 0.7})
  write(folder, off[1], {"test": 0.7}, without=["unseen"])
  return plan, folder


def test_a_table_has_the_means_of_known_results(measured):
  content = summarised(*measured)
  assert content["columns"] == {
    "generated/acc1_seen": "generated images, seen pairs ↑",
    "generated/acc1_unseen": "generated images, unseen pairs ↑",
    "test/acc1": "top-1 test ↑",
    "unseen/acc1": "top-1 unseen ↑",
    "test_retrieval/recall@1": "R@1 test ↑",
  }
  off, on = content["tables"]["4"]["rows"]
  assert (off["label"], off["is_base"], on["label"], on["is_base"]) == ("disabled", False, "enabled", True)
  assert on["paper"] == {"fid": 9.80, "imagenet/acc1": 25.92, "recall@1": 33.60}
  np.testing.assert_allclose([*on["cells"]["test/acc1"]["values"].values()], [90, 91, 92])
  np.testing.assert_allclose([on["cells"]["test/acc1"][name] for name in ("mean", "sd", "n")], [91, 1, 3])
  assert on["cells"]["test/acc1"]["difference"] is None
  np.testing.assert_allclose([*off["cells"]["test/acc1"]["values"].values()], [70])
  assert off["cells"]["test/acc1"]["sd"] is None
  np.testing.assert_allclose(off["cells"]["test/acc1"]["difference"]["mean"], -20)
  off_runs = [content["runs"][name] for name in off["runs"]]
  assert [run["evaluations"] is None for run in off_runs] == [False, True, True]
  assert off_runs[0]["config"]["model"]["fusion"] is False
  assert json.loads(json.dumps(content)) == json.loads(json.dumps(summarised(*measured)))


def test_the_markdown_has_the_cells_of_known_results(measured):
  text = summary.markdown(summarised(*measured))
  lines = text.splitlines()
  at = next(i for i, line in enumerate(lines) if line.startswith("## Table 4: Dual-stream deep fusion"))
  head, _, off, difference, paper, on, paper_on = lines[at + 2 : at + 9]
  assert head == (
    "|  | generated images, seen pairs ↑ | generated images, unseen pairs ↑ | top-1 test ↑ | top-1 unseen ↑"
    " | R@1 test ↑ | FID ↓ (paper) | ImageNet top-1 ↑ (paper) | mean R@1 ↑ (paper) |"
  )
  half = "50.00 (n = 1)"
  assert off == f"| disabled | {half} | {half} | 70.00 (n = 1) | {half} | {half} |  |  |  |"
  assert difference == "| − base | -50.00 | -50.00 | -20.00 | +0.00 | +0.00 |  |  |  |"
  assert paper == "| *paper* |  |  |  |  |  | 10.05 | 24.53 | 32.97 |"
  assert on.startswith("| **enabled** | 100.00 ± 0.00 | 100.00 ± 0.00 | 91.00 ± 1.00 | 50.00 ± 0.00 |")
  assert paper_on == "| *paper* |  |  |  |  |  | 9.80 | 25.92 | 33.60 |"


def table_7(folder_path, *, fid_images):
  """Summarise Table 7 of the paper's config. Its rows have an FID of 10, 11 and 12, and equal other figures."""
  config = base("paper")
  config.evals.fid.num_images = fid_images
  plan, folder = make_plan(config, names=["7"], seeds=(0,)), Folder(folder_path)
  for place in range(3):
    (run,) = plan.rows["7", place]
    write(folder, run, {"fid": 10 + place, "imagenet": 0.25, "coco": 0.2, "flickr": 0.4})
  return summarised(plan, folder)


def test_the_papers_figures_stand_under_ours(tmp_path):
  """FID is unchanged, top-1 is in per cent, and R@1 is the mean of four."""
  content = table_7(tmp_path, fid_images=30_000)
  assert [*content["columns"]] == ["fid", "imagenet/acc1", "recall@1"]
  means = [cell["mean"] for cell in content["tables"]["7"]["rows"][1]["cells"].values()]
  np.testing.assert_allclose(means, [11, 25, 30])
  lines = summary.markdown(content).splitlines()
  assert "| *paper* | 12.02 | 21.73 | 27.56 |" in lines and "|  | FID ↓ | ImageNet top-1 ↑ | mean R@1 ↑ |" in lines


def test_fid_of_few_images_has_a_column_apart_from_the_papers(tmp_path):
  """FID of 1000 images, as configs/diffdis_cc3m.py measures it during training, is biased upwards."""
  content = table_7(tmp_path, fid_images=1000)
  assert [*content["columns"]] == ["fid/fid", "imagenet/acc1", "recall@1"]
  lines = summary.markdown(content).splitlines()
  assert "|  | FID ↓ | ImageNet top-1 ↑ | mean R@1 ↑ | FID ↓ (paper) |" in lines
  assert "| *paper* |  | 21.73 | 27.56 | 12.02 |" in lines


def test_only_differences_that_stay_significant_after_holms_correction_are_bold(tmp_path):
  """The differences on test are -2, 3 and -1. Those on unseen are -20, -20.2 and -20.1: t is 348 and p 8e-6, which
  Holm's correction doubles. The other three columns are 50 in all runs and are not counted."""
  plan, folder = make_plan(names=["4"]), Folder(tmp_path)
  for seed in range(3):
    write(folder, plan.rows["4", 0][seed], {"test": (0.80, 0.86, 0.80)[seed], "unseen": (0.1, 0.2, 0.3)[seed]})
    write(folder, plan.rows["4", 1][seed], {"test": (0.82, 0.83, 0.81)[seed], "unseen": (0.3, 0.402, 0.501)[seed]})
  content = summarised(plan, folder)
  text = summary.markdown(content)
  equal = "+0.00 in every seed, *undecided*"
  assert (
    f"| − base | {equal} | {equal} | +0.00 [-6.57, +6.57], p 1.000, Holm 1.000, *undecided*, MDE 8.6 |"
    f" **-20.10 [-20.35, -19.85], p < 0.001, Holm < 0.001** | {equal} |"
  ) in text
  assert (
    "\n1 of 2 differences bold; chance alone makes any bold in at most 5 % of such tables. Before Holm's correction 1"
    " have p < 0.05; chance gives 0.1.\n"
  ) in text
  count = {"differences": 2, "significant": 1, "uncorrected": 1, "uncorrected_by_chance": 0.1}
  assert content["tables"]["4"]["count"] == count


def test_protocols_are_not_mixed(tmp_path):
  plan, folder = make_plan(names=["4"], seeds=(0, 1)), Folder(tmp_path)
  off, on = plan.rows["4", 0]
  write(folder, off, {}, num_noise_samples=1)
  write(folder, on, {}, num_noise_samples=4)
  with pytest.raises(UserError) as error:
    summarised(plan, folder)
  for words in ("table 4 would mix protocols", "num_noise_samples 1 in", "and 4 in", folder.results(on)):
    assert words in str(error.value)


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_left_out_and_logged(measured, caplog, figure):
  """Its seed is left out of the pairs, like a seed without a run; the other figures stay."""
  plan, folder = measured
  write(folder, plan.rows["4", 0][1], {"test": figure})
  write(folder, plan.rows["4", 0][2], {"test": 0.8})
  content = summarised(plan, folder)
  assert (
    content["runs"][plan.rows["4", 0][1].name]["evaluations"]["test"]["metrics"]["acc1"] is None
  )  # NaN is null in JSON
  off, on = content["tables"]["4"]["rows"]
  assert [*off["cells"]["test/acc1"]["values"]] == ["0", "2"] and off["cells"]["unseen/acc1"]["n"] == 3
  assert off["cells"]["test/acc1"]["difference"]["n"] == 2 and on["cells"]["test/acc1"]["n"] == 3
  assert f"{plan.rows['4', 0][1].name}: test/acc1 is {figure}, and is left out" in caplog.text


def test_the_status_has_the_hours_that_are_left(tmp_path, monkeypatch):
  """One run has 9 steps of 2 s left, another 18 steps at the same speed, and an autoencoder 8 steps."""
  plan, folder = make_plan(names=["4"], seeds=(0,)), Folder(tmp_path)
  first, second, third = plan.runs
  states = {
    first: State(step=0, num_steps=8, measured=True, seconds=None),
    second: State(step=9, num_steps=18, measured=False, seconds=2.0),
    third: State(step=0, num_steps=18, measured=False, seconds=None),
  }
  monkeypatch.setattr(folder, "state", states.get)
  lines = running.lines(plan, folder)
  assert lines[0].split() == ["0", first.name, "missing", "?", "h"]
  assert lines[1].split() == ["1", second.name, *"step 9 of 18".split(), "0.01", "h"]
  assert "table 4, enabled: runs 2" in lines
  assert lines[-1].startswith("3 runs, 0 finished; 0.01 hours of steps left") and "and 1 runs whose speed" in lines[-1]
  for run in plan.runs:
    states[run] = State(step=18, num_steps=18, measured=True, seconds=2.0)
  assert running.lines(plan, folder)[-1] == "3 runs, 3 finished"
  assert tables.PAPER_METRICS.keys() == {"fid", "imagenet/acc1", "recall@1"}
