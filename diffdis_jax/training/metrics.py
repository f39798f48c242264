"""Measure a run between two lines of its log: the metrics of steps, the replaced records, and the speed."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu.metrics import Average
from jaxtyping import Array, Float
from tqdm import tqdm

from diffdis_jax.common import progress
from diffdis_jax.config.run import Run
from diffdis_jax.data import loader
from diffdis_jax.parallel import processes

# Name -> total and count, which are added up over samples, microbatches and steps. Their ratio is the mean.
Metrics = dict[str, Average]
SKIPPED = "skipped"  # the number of skipped steps (step.py)


def mean_of(per_sample: Float[Array, "b"]) -> Average:
  """Return a metric with the sum over samples and their number."""
  return Average(total=jnp.sum(per_sample), count=jnp.asarray(len(per_sample), jnp.float32))


class Meters:
  """Add up the metrics of a run's steps, and time the steps, from one line of its log to the next.

  Args:
    run: the run's config.
    start_step: the number of finished steps.
    meta: the result of `to_meta` in the last checkpoint; empty for a new run.
  """

  def __init__(self, run: Run, *, start_step: int, meta: Mapping[str, Any]):
    self._run, self._first = run, start_step + 1
    saved = meta.get("totals") or {}
    self._totals: Metrics = {
      name: Average(total=np.float32(total), count=np.float32(count)) for name, (total, count) in saved.items()
    }
    self._last: Metrics | None = None  # the metrics of the newest step
    self._replaced = loader.Substitutions()
    if processes.is_first() and (counts := meta.get("substituted")):
      self._replaced.new += np.array(counts, np.int64)
    self._restart(start_step)

  def steps(self) -> Iterator[int]:
    """Yield the numbers of the remaining steps, with a progress bar on a terminal."""
    with progress.Progress("training", self._run.num_steps, "steps", done=self._first - 1, every=None) as bar:
      for step in range(self._first, self._run.num_steps + 1):
        yield step
        bar.update(1)

  def next_rows(self, data: Iterator[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Read the next batch while the devices still compute the step before."""
    begin = time.monotonic()
    rows = self._replaced.take(next(data))
    if self._last is None or all(value.is_ready() for value in jax.tree.leaves(self._last)):
      self._waited += time.monotonic() - begin  # the devices were idle
    return rows

  def add(self, step: int, metrics: Metrics) -> None:
    """Add a step's metrics on the devices: fetching them here would wait for the step."""
    # The host is only one step ahead of the devices, so that waiting here measures the time of a step.
    jax.block_until_ready(self._last)
    if step == self._first:
      jax.block_until_ready(metrics)  # the first step compiles, and is not timed
      self._restart(step)
    self._totals = jax.tree.map(jnp.add, self._totals, metrics) if self._totals else metrics
    self._last = metrics

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Wait for the steps so far, and do not count the time of the block, such as a save."""
    jax.block_until_ready(self._last)
    begin = time.monotonic()
    yield
    self._begin += time.monotonic() - begin

  def report(self, step: int) -> dict[str, float]:
    """Return the means, counts and speed since the last line, and begin the next. All processes call this."""
    totals, self._totals = jax.device_get(self._totals), {}
    skipped = float(totals.pop(SKIPPED).total)
    # If all steps were skipped, there are no means.
    means = {name: float(x.total) / float(x.count) if x.count else math.nan for name, x in totals.items()}
    if skipped:
      logging.warning("%d steps up to %d changed nothing: loss or gradient was not finite", skipped, step)
      means[SKIPPED] = skipped
    seconds = max(time.monotonic() - self._begin, 1e-9)  # the clock may be too coarse
    rate = (step - self._begun_at) / seconds or math.nan
    speeds = {"steps_per_sec": rate, "images_per_sec": rate * self._run.batch_size}
    speeds["data_wait"] = math.nan if math.isnan(rate) else min(self._waited / seconds, 1.0)
    logging.info("%s", progress_line(step, self._run.num_steps, means | speeds))
    self._restart(step)
    return means | speeds | self._replaced.report(processes.over_hosts)

  def to_meta(self) -> dict[str, Any]:
    """Return JSON values for a checkpoint, so that the next line is like that of an uninterrupted run."""
    # Every f32 is a double, and JSON preserves doubles exactly.
    totals = {name: [float(x.total), float(x.count)] for name, x in jax.device_get(self._totals).items()}
    return {"totals": totals, "substituted": processes.over_hosts(self._replaced.new).tolist()}

  def _restart(self, step: int) -> None:
    self._begun_at, self._begin, self._waited = step, time.monotonic(), 0.0


# The parts of a loss, without the quarters of the timestep, which are in metrics.jsonl.
_PART = re.compile(r"loss_(?!.*_q[1-4]$)\w+")
# The paper's symbols; other parts are shown by their column.
_SYMBOLS = {"loss_generation": "L_IG", "loss_discrimination": "L_ITA", "loss_class_contrastive": "class"}


def progress_line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
  """Return a line of the log: the loss and its parts, the speed, the share of time spent waiting for data, and the
  remaining time."""
  known = [name for name in _SYMBOLS if name in values]  # L_IG first; jax sorts metrics by their names
  parts = [name for name in dict.fromkeys([*known, *values]) if _PART.fullmatch(name)]
  shown = [f"step {step}/{num_steps}", f"loss {values['loss']:.4f}"]
  if len(parts) > 1:  # a single part is the loss itself
    shown += [f"{_SYMBOLS.get(name, name.removeprefix('loss_'))} {values[name]:.3g}" for name in parts]
  if not math.isnan(rate := values["steps_per_sec"]):
    shown.append(f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step")
    left = (num_steps - step) / rate  # seconds
    time_left = f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m" if left >= 3600 else tqdm.format_interval(left)
    shown += [f"data wait {values['data_wait']:.0%}", f"{time_left} left"]
  return "  ".join(shown)
