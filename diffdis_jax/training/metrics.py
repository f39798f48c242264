"""Measure a run between two lines of its log: the steps' metrics, replaced records, and speed."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu.metrics import Average
from jaxtyping import Array, Float

from diffdis_jax.config.run import Run
from diffdis_jax.data import copies, loader
from diffdis_jax.parallel import processes
from diffdis_jax.run import writers

# Name -> total and count: totals over samples, microbatches and steps add up, and their ratio is the mean.
Metrics = dict[str, Average]
SKIPPED = "skipped"  # its total is the number of steps that were left out (step.py)


def mean_of(per_sample: Float[Array, "b"]) -> Average:
  """Return a metric: the sum over samples, and their number."""
  return Average(total=jnp.sum(per_sample), count=jnp.asarray(len(per_sample), jnp.float32))


def is_running(metrics: Metrics | None) -> bool:
  """Tell whether the step that gives these metrics still runs."""
  return metrics is not None and not all(value.is_ready() for value in jax.tree.leaves(metrics))


class Meters:
  """The metrics, counts and speed since the last line of the log.

  Args:
    run: the run's config.
    start_step: the steps that are finished.
    meta: what `to_meta` returned when the run was saved; empty for a new run.
    peak_rate: as `writers.Throughput` takes it.
  """

  def __init__(self, run: Run, *, start_step: int, meta: Mapping[str, Any], peak_rate: float | None):
    self._run, self._first = run, start_step + 1
    self._speed = writers.Throughput(
      start_step=start_step, num_steps=run.num_steps, batch_size=run.batch_size, peak_rate=peak_rate
    )
    saved = meta.get("totals") or {}
    self._totals: Metrics = {
      name: Average(total=np.float32(total), count=np.float32(count)) for name, (total, count) in saved.items()
    }
    self._last: Metrics | None = None  # of the newest step
    self._replaced = loader.Substitutions()
    if processes.is_first() and (counts := meta.get("substituted")):
      self._replaced.new += np.array(counts, np.int64)

  def steps(self) -> Iterator[int]:
    """Count through the steps that are left, with a bar on a terminal."""
    return self._speed.steps()

  def next_rows(self, data: grain.DatasetIterator) -> dict[str, Any]:
    """Read the next batch while the devices still work on the step before, so that its time is hidden."""
    waiting = self._speed.waiting_for_data(functools.partial(is_running, self._last))
    with waiting, copies.naming_silence(self._run.data.paths):
      return self._replaced.take(next(data))

  def add(self, step: int, metrics: Metrics) -> None:
    """Add a step's metrics on the devices; to fetch them here would wait for the step."""
    # One step ahead of the devices and no more, so that a wait for them is the time of a step.
    jax.block_until_ready(self._last)
    if step == self._first:
      jax.block_until_ready(metrics)  # starting is no speed
      self._speed.restart(step)
    self._totals = jax.tree.map(jnp.add, self._totals, metrics) if self._totals else metrics
    self._last = metrics

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Wait for the steps before what is no training step, such as a save, and do not count its time."""
    jax.block_until_ready(self._last)
    with self._speed.paused():
      yield

  def report(self, step: int) -> dict[str, float]:
    """Return the means, counts and speed since the last line, and begin the next. Every process calls this."""
    totals, self._totals = jax.device_get(self._totals), {}
    skipped = float(totals.pop(SKIPPED).total)
    # Steps that were all left out have no means.
    means = {name: float(x.total) / float(x.count) if x.count else math.nan for name, x in totals.items()}
    if skipped:
      logging.warning("%d steps up to %d changed nothing: loss or gradient was not finite", skipped, step)
      means[SKIPPED] = skipped
    speeds = self._speed.report(step, means)
    counts = self._replaced.report(processes.over_hosts)
    return means | speeds | slowest_host(speeds["data_wait"]) | counts

  def to_meta(self) -> dict[str, Any]:
    """Return JSON values for a checkpoint, so that the next line is that of a run that was never stopped."""
    # A double holds every f32, and JSON gives a double back as it was.
    totals = {name: [float(x.total), float(x.count)] for name, x in jax.device_get(self._totals).items()}
    return {"totals": totals, "substituted": processes.over_hosts(self._replaced.new).tolist()}


def slowest_host(data_wait: float) -> dict[str, float]:
  """Return which of several hosts waits for data longest, and its share of time: the others wait for it in every step.
  Every process calls this."""
  if jax.process_count() == 1:
    return {}
  shares = np.nan_to_num(processes.gathered(np.float32(data_wait)))
  return {"slowest_host": float(shares.argmax()), "slowest_host_data_wait": float(shares.max())}
