"""Test paired differences of a few seeds: an interval, p, Holm's correction, and what the design can detect.

All of it is the two-sided t-test of a mean. It takes the seeds' differences for samples of one normal distribution.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

ALPHA = 0.05  # of the intervals, of p, and of a whole table after Holm's correction
POWER = 0.8
# A spread of so small a part of the differences is that of their rounding. So is one that is so small by itself, in per
# cent or FID: the figures are equal except for rounding.
ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """The mean of paired differences.

  Attributes:
    mean: of the differences, in the unit of the figure.
    n: how many pairs.
    se: standard error of the mean, sd / √n; None of one pair.
    low, high: the 95 % interval, mean ± t(0.975, n - 1) se. None where there is nothing to judge by: of one pair, and
      where the difference is the same in every pair, which coarse figures of few seeds often are by chance.
    p: of no difference, by the t distribution of n - 1 degrees of freedom; None as above.
    detectable: the least true difference that this test, alone, finds with 80 % power; None as above.
    p_holm: p after Holm's correction over the differences of a table.
    is_significant: whether p_holm is below 5 %; False where it cannot be told.
  """

  mean: float
  n: int
  se: float | None
  low: float | None = None
  high: float | None = None
  p: float | None = None
  detectable: float | None = None
  p_holm: float | None = None
  is_significant: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
  """The number of significant differences in a table.

  Attributes:
    differences: those with a p.
    significant: after Holm's correction. Chance makes any of a table so in at most 5 % of all tables.
    uncorrected: those with p < 5 %.
    uncorrected_by_chance: how many of these are expected where nothing differs.
  """

  differences: int
  significant: int
  uncorrected: int
  uncorrected_by_chance: float


def paired(pairs: Sequence[float]) -> Difference:
  """Return the mean of at least one difference, with its interval and p, without a correction."""
  from scipy import stats  # here and below, since it takes a second and `ablate run` does not need it

  mean, n = statistics.fmean(pairs), len(pairs)
  if n == 1:
    return Difference(mean=mean, n=n, se=None)
  sd = statistics.stdev(pairs)
  if sd <= ROUNDING * max(1.0, *map(abs, pairs)):
    return Difference(mean=mean, n=n, se=0.0)
  se = sd / n**0.5
  half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * se
  return Difference(
    mean=mean,
    n=n,
    se=se,
    low=mean - half,
    high=mean + half,
    p=float(2 * stats.t.sf(abs(mean) / se, n - 1)),
    detectable=detectable(sd, n),
  )


def detectable(sd: float, n: int) -> float:
  """Return the d of which P(T > t(0.975, n - 1)) = 80 %.

  T is noncentral t of n - 1 degrees and noncentrality √n d / sd, where sd is that of the paired differences. There is
  no correction for other comparisons. For n = 3, 5 and 10 the result is 3.3, 1.7 and 1.0 times sd. That T lies beyond
  the other end, as the test's other side asks, has a probability below 1e-5.
  """
  from scipy import special, stats

  shift = special.nctdtrinc(n - 1, 1 - POWER, stats.t.ppf(1 - ALPHA / 2, n - 1))
  return float(shift) * sd / n**0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """The verdict on a comparison that was named before the runs.

  Attributes:
    difference: corrected over all comparisons of the experiment.
    bound: the largest difference that counts as none.
    p_equivalent: of a true difference of `bound` or more, by two one-sided t-tests (TOST); None where the difference
      has no p.
    p_equivalent_holm: after Holm's correction over the experiment's.
    words: "higher" or "lower" where the difference is significant, "no effect larger than BOUND" where that is, both
      where both are, "undecided" where neither.
  """

  difference: Difference
  bound: float
  p_equivalent: float | None
  p_equivalent_holm: float | None
  words: str


def equivalent(pairs: Sequence[float], bound: float) -> float | None:
  """Return p of a true difference outside of ± bound (Schuirmann, 1987): the larger of the two one-sided tests'.

  It is below 5 % where the 90 % interval, mean ± t(0.95, n - 1) se, lies within the bound.
  """
  from scipy import stats

  found = paired(pairs)
  if found.p is None or not found.se:
    return None
  return float(stats.t.sf((bound - abs(found.mean)) / found.se, found.n - 1))


def verdicts(pairs: Sequence[Sequence[float]], bounds: Sequence[float], *, named: int | None = None) -> list[Verdict]:
  """Return the verdicts on the comparisons of an experiment, each with its paired differences and its bound, in their
  order.

  Args:
    pairs: of each comparison that has some.
    bounds: of the same.
    named: how many comparisons the experiment has, by which all are corrected; None for those that have a p.
  """
  differences = correct([paired(each) for each in pairs], named=named)
  p_values = [equivalent(each, bound) for each, bound in zip(pairs, bounds, strict=True)]
  adjusted = iter(holm([p for p in p_values if p is not None], named=named))
  found = []
  for difference, bound, p in zip(differences, bounds, p_values, strict=True):
    p_holm = None if p is None else next(adjusted)
    words = [("higher" if difference.mean > 0 else "lower")] if difference.is_significant else []
    if p_holm is not None and p_holm < ALPHA:
      words.append(f"no effect larger than {bound:g}")
    said = ", ".join(words) or "undecided"
    found.append(Verdict(difference=difference, bound=bound, p_equivalent=p, p_equivalent_holm=p_holm, words=said))
  return found


def holm(p_values: Sequence[float], *, named: int | None = None) -> list[float]:
  """Return adjusted p (Holm, 1979), in the order of `p_values`.

  That of rank i of m is the largest of (m - j) p_j, j <= i.

  `named`: m, where some of the tests have no p yet, as if theirs were 1; None for as many as there are.
  """
  order, m = np.argsort(p_values, kind="stable"), len(p_values) if named is None else named
  steps = (m - np.arange(len(p_values))) * np.asarray(p_values)[order]
  adjusted = np.empty(len(p_values))
  # The running maximum keeps the order: a larger p never gets a smaller adjusted one.
  adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
  return adjusted.tolist()


def correct(differences: Sequence[Difference], *, named: int | None = None) -> list[Difference]:
  """Return the differences of a table, in their order, with Holm's correction over all that have a p, or as `holm` has
  it."""
  # Only of differences that were tested: others would make the correction stricter for nothing.
  adjusted = iter(holm([each.p for each in differences if each.p is not None], named=named))
  found = []
  for each in differences:
    p_holm = None if each.p is None else next(adjusted)
    significant = p_holm is not None and p_holm < ALPHA
    found.append(dataclasses.replace(each, p_holm=p_holm, is_significant=significant))
  return found


def count(differences: Sequence[Difference]) -> Count:
  """Count the corrected differences of a table."""
  p_values = [each.p for each in differences if each.p is not None]
  return Count(
    differences=len(p_values),
    significant=sum(each.is_significant for each in differences),
    uncorrected=sum(p < ALPHA for p in p_values),
    uncorrected_by_chance=ALPHA * len(p_values),
  )
