"""Against scipy's own tests, a power that is integrated and one that is simulated, and Holm by closed testing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from diffdis_jax.ablate import significance


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_interval_and_p_are_scipys(n):
  rng = np.random.default_rng(n)
  ours, base = rng.normal(1.0, 2.0, n), rng.normal(0.0, 2.0, n)
  found = significance.paired((ours - base).tolist())
  theirs = stats.ttest_rel(ours, base)
  interval = theirs.confidence_interval(0.95)
  np.testing.assert_allclose([found.p, found.low, found.high], [theirs.pvalue, interval.low, interval.high], rtol=1e-9)
  np.testing.assert_allclose(found.p, stats.ttest_1samp(ours - base, 0.0).pvalue, rtol=1e-9)
  np.testing.assert_allclose([found.mean, found.se], [(ours - base).mean(), stats.sem(ours - base)], rtol=1e-9)
  assert found.n == n and found.p_holm is None and not found.is_significant


def test_an_interval_by_hand():
  """2, 1, 6: mean 3, variance 7; t(0.975, 2) = 4.3027 of the tables, where t = 3 / √(7 / 3) = 1.9640 is not 5 %.

  Of two degrees of freedom P(|T| > t) is 1 - t / √(2 + t²).
  """
  found = significance.paired([2.0, 1.0, 6.0])
  error, t = math.sqrt(7 / 3), 3 / math.sqrt(7 / 3)
  assert (found.low, found.high) == pytest.approx((3 - 4.3027 * error, 3 + 4.3027 * error), abs=1e-3)
  assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-12)


@pytest.mark.parametrize(
  "pairs", [[1.0], [1.0, 1.0], [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0, 0.0], [100 * (0.1 + 0.2) - 100 * 0.3, 0.0, 0.0]]
)
def test_without_a_spread_nothing_is_claimed(pairs):
  """One pair, or the same difference in each, be it up to rounding: that of the differences, or, where there is none,
  of the figures."""
  found = significance.paired(pairs)
  assert found.mean == pytest.approx(pairs[-1])
  assert (found.low, found.high, found.p, found.detectable) == (None,) * 4
  assert found.se == (None if len(pairs) == 1 else 0.0)
  (corrected,) = significance.correct([found])
  assert corrected.p_holm is None and not corrected.is_significant


def power(difference: float, n: int) -> float:
  """Of the two-sided t-test at 5 % for sd = 1: the normal tails beyond ± t s / √n, over the density of s."""
  critical = {2: 12.706205, 3: 4.302653, 5: 2.776445, 10: 2.262157}[n]  # of the tables
  u = np.linspace(1e-6, 12.0, 200_001)  # s √(n - 1) is chi of n - 1 degrees of freedom
  degrees = n - 1
  density = u ** (degrees - 1) * np.exp(-(u**2) / 2) / (2 ** (degrees / 2 - 1) * math.gamma(degrees / 2))
  bound, shift = critical * u / math.sqrt(degrees), difference * math.sqrt(n)
  beyond = stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift)
  return float(np.trapezoid(beyond * density, u))


@pytest.mark.parametrize("n, rounded", [(2, 11.5), (3, 3.3), (5, 1.7), (10, 1.0)])
def test_the_detectable_difference_has_80_per_cent_power(n, rounded):
  found = significance.detectable(1.0, n)
  assert power(found, n) == pytest.approx(0.8, abs=1e-5)
  assert round(found, 1) == rounded
  assert significance.detectable(2.5, n) == pytest.approx(2.5 * found)


def test_holm_by_hand():
  """0.01 · 4, 0.02 · 3, then 0.03 · 2 = 0.06 and 0.04 · 1, which may not be less than the one before it."""
  assert significance.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
  assert significance.holm([0.9, 0.6]) == [1.0, 1.0]
  assert significance.holm([]) == []
  assert significance.holm([0.02, 0.01], named=4) == significance.holm([0.02, 0.01, 1.0, 1.0])[:2]


def test_holm_is_closed_testing_by_bonferroni():
  """Adjusted p: the largest, over all sets with this hypothesis, of the set's size times its least p."""
  p = np.random.default_rng(3).uniform(0, 0.2, 6)
  for i, adjusted in enumerate(significance.holm(p.tolist())):
    sets = [s for size in range(1, 7) for s in itertools.combinations(range(6), size) if i in s]
    assert adjusted == pytest.approx(min(1.0, max(len(s) * p[[*s]].min() for s in sets)))


def test_one_is_significant_by_its_corrected_p():
  """The first is below 5 % after correction, the second before it alone; one seed counts for nothing."""
  measured = ([10.0, 10.1, 9.9], [1.5, 3.4, 2.6], [1.0, -1.0, 0.5])
  corrected = significance.correct([significance.paired(pairs) for pairs in (*measured, [1.0])])
  p = [stats.ttest_1samp(pairs, 0.0).pvalue for pairs in measured]
  np.testing.assert_allclose([each.p_holm for each in corrected[:3]], [3 * p[0], 2 * p[1], p[2]])
  assert [each.is_significant for each in corrected] == [True, False, False, False]
  assert p[1] < 0.05 < 2 * p[1] and corrected[3].p_holm is None


def test_p_and_intervals_are_scipys_on_random_cases():
  """2,000 pairs of rows of 2 to 10 seeds, of any size and spread: those of the paired t-test."""
  rng = np.random.default_rng(4)
  for _ in range(2000):
    n, scale = int(rng.integers(2, 11)), 10 ** rng.uniform(-3, 3)
    ours, base = scale * rng.normal(size=(2, n)) + rng.uniform(-1, 1, (2, 1))
    test = stats.ttest_rel(ours, base)
    low, high = test.confidence_interval(0.95)
    found = significance.paired((ours - base).tolist())
    np.testing.assert_allclose(found.p, test.pvalue, rtol=0, atol=1e-9)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-9, atol=1e-9 * scale)
