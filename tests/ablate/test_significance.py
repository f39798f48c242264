"""Compare the statistics with scipy's tests, a numerically integrated power, and Holm by closed testing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from diffdis_jax.ablate import significance


@pytest.mark.parametrize(
  "pairs", [[1.0], [1.0, 1.0], [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0, 0.0], [100 * (0.1 + 0.2) - 100 * 0.3, 0.0, 0.0]]
)
def test_without_variance_no_difference_is_significant(pairs):
  """There is one pair, or all pairs have the same difference, up to rounding of the differences or of the figures."""
  difference = significance.paired(pairs)
  assert difference.mean == pytest.approx(pairs[-1])
  assert (difference.low, difference.high, difference.p, difference.detectable) == (None,) * 4
  assert difference.se == (None if len(pairs) == 1 else 0.0)
  (corrected,) = significance.correct([difference])
  assert corrected.p_holm is None and not corrected.is_significant


def power(difference: float, n: int) -> float:
  """Return the power of the two-sided t-test at 5 % for sd = 1: integrate the tails beyond ± t s / √n over s."""
  critical = {2: 12.706205, 3: 4.302653, 5: 2.776445, 10: 2.262157}[n]  # from a table of t
  u = np.linspace(1e-6, 12.0, 200_001)  # s √(n - 1) has a chi distribution with n - 1 degrees of freedom
  degrees = n - 1
  density = u ** (degrees - 1) * np.exp(-(u**2) / 2) / (2 ** (degrees / 2 - 1) * math.gamma(degrees / 2))
  bound, shift = critical * u / math.sqrt(degrees), difference * math.sqrt(n)
  beyond = stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift)
  return float(np.trapezoid(beyond * density, u))


@pytest.mark.parametrize("n, rounded", [(2, 11.5), (3, 3.3), (5, 1.7), (10, 1.0)])
def test_the_detectable_difference_has_80_per_cent_power(n, rounded):
  smallest = significance.detectable(1.0, n)
  assert power(smallest, n) == pytest.approx(0.8, abs=1e-5)
  assert round(smallest, 1) == rounded
  assert significance.detectable(2.5, n) == pytest.approx(2.5 * smallest)


def test_holms_correction_equals_one_by_hand():
  """The products are 0.01 · 4, 0.02 · 3, 0.03 · 2 and 0.04 · 1; the last is raised to the one before it, 0.06."""
  assert significance.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
  assert significance.holm([0.9, 0.6]) == [1.0, 1.0]
  assert significance.holm([]) == []
  assert significance.holm([0.02, 0.01], named=4) == significance.holm([0.02, 0.01, 1.0, 1.0])[:2]


def test_holms_correction_equals_closed_testing_by_bonferroni():
  """The adjusted p is the maximum, over all sets with this hypothesis, of the set's size times its smallest p."""
  p = np.random.default_rng(3).uniform(0, 0.2, 6)
  for i, adjusted in enumerate(significance.holm(p.tolist())):
    sets = [s for size in range(1, 7) for s in itertools.combinations(range(6), size) if i in s]
    assert adjusted == pytest.approx(min(1.0, max(len(s) * p[[*s]].min() for s in sets)))


def test_significance_is_by_the_corrected_p():
  """The first p is below 5 % after correction, the second only before it; a single seed has no p."""
  measured = ([10.0, 10.1, 9.9], [1.5, 3.4, 2.6], [1.0, -1.0, 0.5])
  corrected = significance.correct([significance.paired(pairs) for pairs in (*measured, [1.0])])
  p = [stats.ttest_1samp(pairs, 0.0).pvalue for pairs in measured]
  np.testing.assert_allclose([difference.p_holm for difference in corrected[:3]], [3 * p[0], 2 * p[1], p[2]])
  assert [difference.is_significant for difference in corrected] == [True, False, False, False]
  assert p[1] < 0.05 < 2 * p[1] and corrected[3].p_holm is None


def test_p_and_intervals_equal_scipys_on_random_cases():
  """Compare with the paired t-test for 2,000 pairs of rows of 2 to 10 seeds, of any mean and variance."""
  rng = np.random.default_rng(4)
  for _ in range(2000):
    n, scale = int(rng.integers(2, 11)), 10 ** rng.uniform(-3, 3)
    ours, base = scale * rng.normal(size=(2, n)) + rng.uniform(-1, 1, (2, 1))
    test = stats.ttest_rel(ours, base)
    low, high = test.confidence_interval(0.95)
    ours_of_pairs = significance.paired((ours - base).tolist())
    np.testing.assert_allclose(ours_of_pairs.p, test.pvalue, rtol=0, atol=1e-9)
    np.testing.assert_allclose([ours_of_pairs.low, ours_of_pairs.high], [low, high], rtol=1e-9, atol=1e-9 * scale)
