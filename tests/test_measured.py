"""The tables of paired differences in docs/ are those of the results in docs/measured."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from diffdis_jax.errors import UserError
from docs.measured import tables

DOCS = pathlib.Path(tables.__file__).parents[1]
SHAPES = [
  name for name, measured in tables.TABLES.items() if measured.page == "results.md" and "shapes" in measured.folder
]


@pytest.mark.parametrize("page", ["results.md", "emoji.md"])
def test_pages_have_the_tables_of_their_results(page):
  text = (DOCS / page).read_text()
  assert tables.written(page, text) == text


def test_of_65_differences_on_shapes_none_survives():
  """At two standard errors 14 are bold, and chance gives 11.9."""
  counts = [tables.table(name)["count"] for name in SHAPES]
  assert sum(count["differences"] for count in counts) == 65
  assert sum(count["significant"] for count in counts) == 0
  assert sum(count["uncorrected"] for count in counts) == 5
  cells = [cell for name in SHAPES for row in tables.table(name)["rows"] for cell in row["cells"].values()]
  differences = [cell["difference"] for cell in cells if cell["difference"]]
  assert sum(abs(each["mean"]) >= 2 * each["se"] for each in differences) == 14
  assert 65 * 2 * stats.t.sf(2, 2) == pytest.approx(11.9, abs=0.05)


def test_a_difference_on_the_page_is_that_of_its_files():
  """Generation first, `val_vendor`, read without the project's code."""
  read = lambda start: [
    100 * json.loads(path.read_text())["zero_shot"]["val_vendor"]["metrics"]["acc1"]
    for path in sorted((DOCS / "measured/emoji").glob(f"{start}-seed_[012].json"))
  ]
  first = np.array(read("generation_first_discrimination_1800"))
  none = np.array(read("held_temperature_discrimination_1800_epyc"))
  test = stats.ttest_rel(first, none)
  low, high = test.confidence_interval(0.95)
  said = f"{(first - none).mean():+.2f} [{low:+.2f}, {high:+.2f}], p {test.pvalue:.3f}, "
  assert len(first) == 3 and said in (DOCS / "results.md").read_text()


def test_a_page_without_a_place_is_refused():
  with pytest.raises(UserError, match="docs/emoji.md should hold <!-- one change"):
    tables.written("emoji.md", "no place")


def test_a_row_without_files_is_refused():
  with pytest.raises(UserError, match=r"docs/measured/emoji has no results nothing-seed_\*.json"):
    tables.figures_of(tables.TABLES["clip"], "nothing")
