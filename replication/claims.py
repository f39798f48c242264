"""Judge preregistered comparisons by paired differences, and by a bound below which a difference counts as none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.ablate import significance, summary
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.ablate.significance import ALPHA, Difference
from diffdis_jax.ablate.tables import columns_of
from diffdis_jax.evals.results import Results

HEADS = ("comparison", "verdict", "figure", "difference, 95 % interval", "n", "p, Holm", "MDE", "bound", "p, Holm")
NOTE = (
  "Paired by seed. The first p is of no difference, by the t-test; the second of a true difference of the bound or"
  " more, by two one-sided tests. Each stands beside its value after Holm's correction over this table, by which the"
  " verdict is made at 5 %. MDE is the true difference that the uncorrected t-test finds with 80 % power."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """A preregistered comparison: labels of two rows, the name of a metric, and `bound`, the largest difference that
  counts as none."""

  row: str
  base: str
  column: str
  bound: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """The verdict on a comparison.

  Attributes:
    difference: the difference, corrected over all comparisons of the experiment.
    bound: the largest difference that counts as none.
    p_equivalent: p of a true difference of `bound` or more; None if the difference has no p.
    p_equivalent_holm: the same after Holm's correction over the experiment's comparisons.
    words: "higher" or "lower" if the difference is significant, "no effect larger than BOUND" if p_equivalent_holm is,
      both if both are, and "undecided" if neither is.
  """

  difference: Difference
  bound: float
  p_equivalent: float | None
  p_equivalent_holm: float | None
  words: str


def equivalent(pairs: Sequence[float], bound: float) -> float | None:
  """Return p of a true difference outside of ± bound: the larger p of two one-sided tests (Schuirmann, 1987)."""
  from scipy import stats

  if significance.paired(pairs).p is None:
    return None
  sides: tuple[Any, Any] = (
    stats.ttest_1samp(pairs, -bound, alternative="greater"),
    stats.ttest_1samp(pairs, bound, alternative="less"),
  )
  return max(float(side.pvalue) for side in sides)


def verdicts(pairs: Sequence[Sequence[float]], bounds: Sequence[float], *, named: int | None = None) -> list[Verdict]:
  """Return the verdict on each comparison of an experiment, from its paired differences and its bound.

  `named` is the number of comparisons of the experiment, as `significance.holm` takes it for the correction.
  """
  differences = significance.correct([significance.paired(values) for values in pairs], named=named)
  p_values = [equivalent(values, bound) for values, bound in zip(pairs, bounds, strict=True)]
  adjusted = significance.holm(p_values, named=named)
  judged = []
  for difference, bound, p, p_holm in zip(differences, bounds, p_values, adjusted, strict=True):
    words = in_words(difference.mean, difference.p_holm, p_holm, bound)
    judged.append(Verdict(difference=difference, bound=bound, p_equivalent=p, p_equivalent_holm=p_holm, words=words))
  return judged


def in_words(mean: float, p: float | None, p_equivalent: float | None, bound: float) -> str:
  """Return the words of a verdict by its corrected p of no difference, and of one of `bound` or more."""
  words = [("higher" if mean > 0 else "lower")] if p is not None and p < ALPHA else []
  words += [f"no effect larger than {bound:g}"] if p_equivalent is not None and p_equivalent < ALPHA else []
  return ", ".join(words) or "undecided"


def judge(claims: Sequence[Claim], plan: Plan, results: Mapping[Run, Results | None]) -> list[dict[str, Any]]:
  """Return, for each claim, its fields, `values`, the figures of both rows by seed, and its `Verdict`.

  A claim without a seed that both rows have finished has no verdict. The others are still corrected for it: the number
  of comparisons was fixed before the runs, and does not depend on which of them finished.
  """
  rows = {row.label: (table.name, place) for table in plan.tables for place, row in enumerate(table.rows)}
  fields, pairs = [], []
  for claim in claims:
    values = {}
    for label in (claim.row, claim.base):
      columns = {column.name: column for run in plan.rows[rows[label]] for column in columns_of(run.evals)}
      values[label] = summary.by_seed(plan, rows[label], results, columns[claim.column])
    ours, theirs = values.values()
    pairs.append([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    by_text = {label: {str(seed): value for seed, value in by_seed.items()} for label, by_seed in values.items()}
    fields.append({**dataclasses.asdict(claim), "values": by_text, "verdict": None})
  with_values = [place for place, values in enumerate(pairs) if values]
  judged = verdicts([pairs[i] for i in with_values], [claims[i].bound for i in with_values], named=len(claims))
  for place, verdict in zip(with_values, judged, strict=True):
    fields[place]["verdict"] = dataclasses.asdict(verdict)
  return fields


def markdown(judged: Sequence[Mapping[str, Any]]) -> str:
  """Return a table of the claims that `judge` returned."""
  lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
  lines += ["| " + " | ".join(cells(claim)) + " |" for claim in judged]
  return "\n".join(["## Comparisons named before the runs", "", *lines]) + f"\n\n{NOTE}\n"


def cells(claim: Mapping[str, Any]) -> list[str]:
  """Return a row of that table."""
  words, *numbers = _verdict(claim["verdict"], claim["bound"])
  return [f"{claim['row']} − {claim['base']}", words, claim["column"], *numbers]


def _verdict(verdict: Mapping[str, Any] | None, bound: float) -> list[str]:
  if verdict is None:
    return [""] * 5 + [f"{bound:g}", ""]
  difference, n = verdict["difference"], str(verdict["difference"]["n"])
  if difference["p"] is None:
    return [verdict["words"], f"{difference['mean']:+z.2f}", n, "", "", f"{bound:g}", ""]
  interval = f"{difference['mean']:+z.2f} [{difference['low']:+z.2f}, {difference['high']:+z.2f}]"
  p, q = summary.shown_p, verdict
  of_none, of_bound = (
    f"{p(difference['p'])}, {p(difference['p_holm'])}",
    f"{p(q['p_equivalent'])}, {p(q['p_equivalent_holm'])}",
  )
  return [verdict["words"], interval, n, of_none, f"{difference['detectable']:.1f}", f"{bound:g}", of_bound]
