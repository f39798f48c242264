"""Steps that are skipped: those whose gradient is not finite, or much larger than those before.

A skipped step changes nothing but the number of steps. It is judged within the compiled step, so that the host waits
for nothing, and is counted on the host when the next report or checkpoint fetches numbers anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu.metrics import Average
from jaxtyping import Array, Bool, Float

from diffdis_jax.config.sections import Optim
from diffdis_jax.errors import UserError
from diffdis_jax.training.metrics import Metrics

SKIPPED = "skipped"
ROLLING = 100.0  # steps over which the norm's mean and variance are averaged
SETTLED = 20.0  # steps before which nothing is known of them
LEAST = (
  0.1  # deviation that is assumed at least, as a share of the mean: of norms that hardly vary any would be far off
)

# Of the gradient norms of steps that were taken: `count`, `mean`, `variance`. Empty where none is kept.
Norms = dict[str, Float[Array, ""]]


def no_norms(section: Optim) -> Norms:
  """Before the first step."""
  kept = section.skip_bad_steps and section.skip_deviations
  return {name: jnp.zeros(()) for name in ("count", "mean", "variance")} if kept else {}


class Judged(NamedTuple):
  """Whether a step is taken, and the norms after it."""

  good: Bool[Array, ""]
  norms: Norms


def judge(
  loss: Float[Array, ""], norm: Float[Array, ""], norms: Mapping[str, Float[Array, ""]], section: Optim
) -> Judged:
  """Of a step's loss and gradient norm. The norm of a step that is skipped does not count."""
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  if not norms:
    return Judged(good, {})
  count, mean, variance = norms["count"], norms["mean"], norms["variance"]
  deviation = jnp.maximum(jnp.sqrt(variance), LEAST * mean)
  good &= (count < SETTLED) | (norm <= mean + section.skip_deviations * deviation)
  # A plain mean of the first ROLLING norms, later one whose weights fall exponentially.
  share, away = 1.0 / jnp.minimum(count + 1.0, ROLLING), norm - mean
  after = {
    "count": count + 1.0,
    "mean": mean + share * away,
    "variance": (1.0 - share) * (variance + share * jnp.square(away)),
  }
  return Judged(good, chosen(good, after, norms))


def chosen(good: Bool[Array, ""], new: Any, old: Any) -> Any:
  """Two trees of equal structure: the new one of a step that is taken, the old one, bit for bit, of one that is not."""
  return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def of_taken(good: Bool[Array, ""], metrics: Metrics, norm: Float[Array, ""]) -> Metrics:
  """A step's metrics, nothing of one that is skipped; and SKIPPED, whose count says whether it was, and whose total is
  its gradient norm then."""
  zeros = jax.tree.map(jnp.zeros_like, metrics)
  skipped = Average(total=jnp.where(good, 0.0, norm), count=jnp.where(good, 0.0, 1.0))
  return {**chosen(good, metrics, zeros), SKIPPED: skipped}


class _Taken(NamedTuple):
  """A step that the host has not looked at yet; `rows` names its records."""

  step: int
  skipped: Average
  rows: np.ndarray


class SkippedSteps:
  """Counts and logs the skipped steps of a run. The counts are the same on every process, the rows its own.

  Args:
    section: the run's.
    meta: what `to_meta` gave when the run's checkpoint was saved; empty of a new run.

  Attributes:
    recent: those of the last `skip_window` steps.
  """

  def __init__(self, section: Optim, meta: Mapping[str, Any]):
    self._section = section
    self.recent: list[int] = list(meta.get("recent", ()))
    self._new = int(meta.get("new", 0))
    self._pending: list[_Taken] = []

  def take(self, step: int, metrics: Metrics, rows: np.ndarray) -> Metrics:
    """Remembers a step; returns its metrics without SKIPPED. Waits for nothing."""
    rest = dict(metrics)
    if SKIPPED in rest:
      self._pending.append(_Taken(step, rest.pop(SKIPPED), rows))
    return rest

  def settle(self) -> None:
    """Looks at the steps since the last time, for which it waits, and logs those that were skipped."""
    found = jax.device_get([each.skipped for each in self._pending])
    for (step, _, rows), skipped in zip(self._pending, found, strict=True):
      if skipped.count:
        self._new += 1
        self.recent.append(step)
        said = "step %d is skipped: its gradient norm is %.4g; its rows: %s"
        logging.warning(said, step, skipped.total, ", ".join(map(str, rows)))
    self._pending.clear()

  def is_beyond(self, step: int) -> bool:
    """Whether more of the last steps were skipped than may be."""
    self.settle()
    self.recent = [each for each in self.recent if each > step - self._section.skip_window]
    # Where none is skipped any more, those were before the run resumed so, and no way back leads around them.
    return 0 < self._section.skip_bad_steps < len(self.recent)

  def report(self) -> dict[str, int]:
    """Those since the last report, as `skipped`; empty where there was none."""
    self.settle()
    new, self._new = self._new, 0
    return {SKIPPED: new} if new else {}

  def too_many(self, step: int, last: int | None) -> UserError:
    """Say why the run ends when more of the steps up to this one were skipped than may be.

    Args:
      last: step of the last checkpoint.
    """
    budget, window = self._section.skip_bad_steps, self._section.skip_window
    return UserError(
      f"{len(self.recent)} of the last {window} steps were skipped by step {step}, from step {self.recent[0]} on; more"
      f" than optim.skip_bad_steps={budget}; the log names their rows, and the last checkpoint is"
      f" {'none' if last is None else last}; lower optim.rates, or set optim.clip_norm or model.dtype='float32', in a"
      " new workdir"
    )

  def to_meta(self) -> dict[str, Any]:
    """JSON values, for a checkpoint."""
    self.settle()
    return {"recent": self.recent, "new": self._new}
