"""Measure a run between two lines of its log: the steps' metrics, replaced records, and speed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu.metrics import Average
from jaxtyping import Array, Float

from diffdis_jax.common import progress
from diffdis_jax.config.run import Run
from diffdis_jax.data import copies, loader
from diffdis_jax.parallel import processes

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
    peak_rate: as `Throughput` takes it.
  """

  def __init__(self, run: Run, *, start_step: int, meta: Mapping[str, Any], peak_rate: float | None):
    self._run, self._first = run, start_step + 1
    self._speed = Throughput(
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


# What a loss adds up; its quarters of the timestep are in metrics.jsonl.
_PART = re.compile(r"loss_(?!.*_q[1-4]$)\w+")
# As the paper names them; others by their column.
_SYMBOLS = {"loss_generation": "L_IG", "loss_discrimination": "L_ITA", "loss_class_contrastive": "class"}


@dataclasses.dataclass(kw_only=True)
class Throughput:
  """Measures how fast a run is, for the progress line and for metrics.jsonl.

  Attributes:
    start_step: steps already finished.
    num_steps: steps of the whole run.
    batch_size: images a step, over all processes.
    peak_rate: steps a second at the chips' peak; None where it is not known.
    clock: seconds.
  """

  start_step: dataclasses.InitVar[int]
  num_steps: int
  batch_size: int
  peak_rate: float | None = None
  clock: Callable[[], float] = time.monotonic

  def __post_init__(self, start_step: int) -> None:
    self.restart(start_step)

  def steps(self) -> Iterator[int]:
    """Yield the numbers of the steps that are left, with a bar on a terminal."""
    first = self._step + 1
    with progress.Progress("training", self.num_steps, "steps", done=first - 1, every=None) as bar:
      for step in range(first, self.num_steps + 1):
        yield step
        bar.update(1)

  @contextlib.contextmanager
  def waiting_for_data(self, is_busy: Callable[[], bool]) -> Iterator[None]:
    """Count the time within as waiting, unless `is_busy` says at its end that the devices are still at an earlier step,
    so that none of it was lost."""
    begin = self.clock()
    yield
    if not is_busy():
      self._waited += self.clock() - begin

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leave out the time within, such as of an evaluation or a save."""
    begin = self.clock()
    yield
    self._begin += self.clock() - begin

  def restart(self, step: int) -> None:
    """Count from here, after `step` steps: after a report, and after the first step, which compiles."""
    self._step = step
    self._begin = self.clock()
    self._waited = 0.0

  def report(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Log the progress line, and return the speeds since the last report.

    Args:
      step: steps finished, more than at the last report.
      metrics: `loss` and its parts are shown.

    Returns:
      `steps_per_sec`, `images_per_sec`, and `data_wait`, the share of time spent waiting for data, in [0, 1]; where the
      chips' peak is known `hfu`, the share of it that the steps' operations are. NaN where no step counted.
    """
    # The clock may not have moved since the last report.
    seconds = max(self.clock() - self._begin, 1e-9)
    counted = step - self._step
    rate = counted / seconds if counted else math.nan
    speeds = {
      "steps_per_sec": rate,
      "images_per_sec": rate * self.batch_size,
      "data_wait": min(self._waited / seconds, 1.0) if counted else math.nan,
    }
    if self.peak_rate is not None:
      speeds["hfu"] = rate / self.peak_rate
    logging.info("%s", self._line(step, metrics, speeds))
    self.restart(step)
    return speeds

  def _line(self, step: int, metrics: Mapping[str, Any], speeds: Mapping[str, float]) -> str:
    known = [name for name in _SYMBOLS if name in metrics]  # L_IG first; jax sorts metrics by their names
    parts = {name: float(metrics[name]) for name in [*known, *metrics] if _PART.fullmatch(name)}
    shown = [f"step {step}/{self.num_steps}", f"loss {float(metrics['loss']):.4f}"]
    if len(parts) > 1:  # a single one is the loss itself
      shown += [f"{_SYMBOLS.get(name, name.removeprefix('loss_'))} {x:.3g}" for name, x in parts.items()]
    if not math.isnan(rate := speeds["steps_per_sec"]):
      shown += [
        f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step",
        f"data wait {speeds['data_wait']:.0%}",
        f"{_duration((self.num_steps - step) / rate)} left",
      ]
    return "  ".join(shown)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, rest = divmod(hours, 24)
  if days > 1:
    return f"{days}d{rest:02}h"
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
