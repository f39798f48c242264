"""Test the verdicts on preregistered comparisons against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffdis_jax.ablate import significance
from replication import claims

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mean", [0.0, 1.0, -1.0, 4.0])
def test_equivalence_is_two_one_sided_tests_of_scipy(mean):
  pairs = np.random.default_rng(1).normal(mean, 1.0, 5)
  above = stats.ttest_1samp(pairs, -2.5, alternative="greater").pvalue
  below = stats.ttest_1samp(pairs, 2.5, alternative="less").pvalue
  assert claims.equivalent(pairs.tolist(), 2.5) == pytest.approx(max(above, below), rel=1e-9)


def test_equivalence_is_the_90_per_cent_interval():
  """The mean of 2, 1, 6 is 3 and t(0.95, 2) = 2.9200, so the interval ends at 3 + 2.92 √(7 / 3) = 7.4604."""
  for bound, is_within in ((7.45, False), (7.47, True)):
    assert (claims.equivalent([2.0, 1.0, 6.0], bound) < 0.05) == is_within
  assert claims.equivalent([1.0], 3.0) is None and claims.equivalent([1.0, 1.0], 3.0) is None


def test_verdicts_on_four_kinds_of_difference():
  """The four cases with a bound of 3: a large effect, a certain small effect, certain equivalence, and too wide a
  spread."""
  pairs = [[9.0, 10.0, 11.0, 10.5, 9.5], [1.0, 1.1, 0.9, 1.05, 0.95], [0.1, -0.2, 0.1, 0.05, 0.0], [5, -5, 4, -4, 3.0]]
  verdicts = claims.verdicts([*pairs, [1.0]], [3.0] * 5)
  assert [verdict.words for verdict in verdicts] == [
    "higher",
    "higher, no effect larger than 3",
    "no effect larger than 3",
    "undecided",
    "undecided",
  ]
  p_values = [verdict.p_equivalent for verdict in verdicts[:4]]
  assert [verdict.p_equivalent_holm for verdict in verdicts[:4]] == significance.holm(p_values)
  assert verdicts[4].p_equivalent is None and verdicts[4].difference.p_holm is None
  negative = claims.verdicts([[-value for value in pairs[0]]], [3.0])
  assert negative[0].words == "lower"
