"""Test paired differences of a few seeds by Student's t, with Holm's correction over a table.

Each test is one of a mean. It takes the seeds' differences for samples of one normal distribution.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

ALPHA = 0.05  # of the intervals, of p, and of a whole table after Holm's correction
POWER = 0.8
# A spread of so small a part of the differences is that of their rounding. So is one that is so small by itself, in per
# cent or FID: the figures are equal except for rounding.
ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """The mean of n paired differences, in the unit of the figure. What is judged is None of one pair, and where all have
  the same difference, which coarse figures of few seeds often have by chance."""

  mean: float
  n: int
  se: float | None  # standard error of the mean, sd / √n; None of one pair
  low: float | None = None  # the 95 % interval
  high: float | None = None
  p: float | None = None  # of no difference, two-sided
  detectable: float | None = None  # the least true difference that this test, alone, finds with 80 % power
  p_holm: float | None = None  # after Holm's correction over the differences of a table
  is_significant: bool = False  # p_holm is below 5 %


def paired(pairs: Sequence[float]) -> Difference:
  """Return the mean of at least one difference, with its interval and p, without a correction."""
  from scipy import stats  # here and below, since it takes a second and `ablate run` does not need it

  mean, n = statistics.fmean(pairs), len(pairs)
  sd = statistics.stdev(pairs) if n > 1 else None
  if sd is None or sd <= ROUNDING * max(1.0, *map(abs, pairs)):
    return Difference(mean=mean, n=n, se=None if sd is None else 0.0)
  test: Any = stats.ttest_1samp(pairs, 0.0)
  low, high = map(float, test.confidence_interval(1 - ALPHA))
  least = detectable(sd, n)
  return Difference(mean=mean, n=n, se=sd / n**0.5, low=low, high=high, p=float(test.pvalue), detectable=least)


def detectable(sd: float, n: int) -> float:
  """Return the d of which P(T > t(0.975, n - 1)) = 80 %.

  T is noncentral t of n - 1 degrees and noncentrality √n d / sd, where sd is that of the paired differences. For n = 3,
  5 and 10 the result is 3.3, 1.7 and 1.0 times sd. The test's other side adds less than 1e-5 to the power.
  """
  from scipy import special, stats

  shift = special.nctdtrinc(n - 1, 1 - POWER, stats.t.ppf(1 - ALPHA / 2, n - 1))
  return float(shift) * sd / n**0.5


def holm(p_values: Sequence[float | None], *, named: int | None = None) -> list[float | None]:
  """Return adjusted p (Holm, 1979), in the order of `p_values`; None stays None. That of rank i of m is the largest of
  (m - j) p_j, j <= i. `named` is m, where some tests have no p yet, as if theirs were 1; by default as many as have."""
  given = np.array([p for p in p_values if p is not None])
  order, m = np.argsort(given, kind="stable"), len(given) if named is None else named
  adjusted = np.empty(len(given))
  # The running maximum keeps the order: a larger p never gets a smaller adjusted one.
  adjusted[order] = np.minimum(np.maximum.accumulate((m - np.arange(len(given))) * given[order]), 1.0)
  values = iter(adjusted.tolist())
  return [None if p is None else next(values) for p in p_values]


def correct(differences: Sequence[Difference], *, named: int | None = None) -> list[Difference]:
  """Return the differences of a table, in their order, with Holm's correction, as `holm` has it."""
  return [
    dataclasses.replace(difference, p_holm=p, is_significant=p is not None and p < ALPHA)
    for difference, p in zip(differences, holm([difference.p for difference in differences], named=named), strict=True)
  ]
