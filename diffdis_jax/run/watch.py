"""Watches the steps of a run: ends a process that hangs, and traces some steps for xprof and Perfetto."""

from __future__ import annotations

import faulthandler
import pathlib
import tempfile
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError

SECONDS = 1800.0  # a save may wait 1200 s for its storage (checkpoint.SAVE_TIMEOUT), and a program may compile as long


class Watchdog:
  """Ends this process with code 1, on which launchers start the run again, when `alive` is not called for `seconds`.

  A device, a collective with a dead peer or a file system can keep a step waiting for ever. The stacks of all threads
  are written to stderr first. A context manager.

  Args:
    seconds: the most that one step, one batch of an evaluation or one save may take; 0 watches nothing.
  """

  def __init__(self, seconds: float = SECONDS):
    self._seconds = seconds

  def __enter__(self) -> Watchdog:
    self.alive()
    return self

  def __exit__(self, *_: object) -> None:
    faulthandler.cancel_dump_traceback_later()

  def alive(self) -> None:
    """Start the time again: the process has come further."""
    if self._seconds:
      faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)  # stderr


class Span(NamedTuple):
  """The steps to trace, from `start` to `last`; the first step of a run is 1."""

  start: int
  last: int


def parse(text: str, *, num_steps: int) -> Span:
  """Read START:STEPS. Raises UserError if it is something else, or not within the run of `num_steps`."""
  start, _, steps = text.partition(":")
  if not (start.isdecimal() and steps.isdecimal() and int(start) and int(steps)):
    raise UserError(f"--profile={text} should be START:STEPS, such as 100:5 for the steps 100 to 104")
  span = Span(int(start), int(start) + int(steps) - 1)
  if span.last > num_steps:
    raise UserError(f"--profile={text} ends at step {span.last}; the run ends at step {num_steps}")
  return span


class Profiler:
  """Traces the steps of a span on each process, into plugins/profile/step_START/ of the workdir, where xprof and
  TensorBoard look. A span whose first step is not after `start_step`, the steps finished, is not traced."""

  def __init__(self, span: Span | None, workdir: epath.PathLike, *, start_step: int):
    self._span, self._workdir = span, buckets.path(workdir)
    self._folder: tempfile.TemporaryDirectory[str] | None = None
    if span and span.start <= start_step:
      logging.warning("no profile: step %d was taken before; this run resumes after step %d", span.start, start_step)
      self._span = None

  def before(self, step: int, running: Any) -> None:
    """Begin the trace before its first step, when `running`, the result of the last step, is there."""
    if self._span and step == self._span.start:
      import jax  # not at the top: a command's flags are read before

      jax.block_until_ready(running)
      # The profiler writes to this machine alone, and the workdir may be in a bucket.
      self._folder = tempfile.TemporaryDirectory(prefix="profile")
      jax.profiler.start_trace(self._folder.name)

  def after(self, step: int, running: Any) -> None:
    """End the trace after its last step."""
    if self._span and step == self._span.last:
      import jax

      jax.block_until_ready(running)
      self.close()

  def close(self) -> None:
    """Write the trace, if one has begun."""
    if self._folder is None or self._span is None:
      return
    import jax

    out = self._workdir / "plugins" / "profile" / f"step_{self._span.start:08d}"
    with self._folder as folder:
      jax.profiler.stop_trace()  # which writes into the folder
      out.mkdir(parents=True, exist_ok=True)
      for path in pathlib.Path(folder).rglob("*.*"):
        for kind in (".xplane.pb", ".trace.json.gz"):
          if path.name.endswith(kind):
            # By the number of the process: two on one machine would give one name by themselves.
            (out / f"host_{jax.process_index():03d}{kind}").write_bytes(path.read_bytes())
    self._folder = None
    logging.info("profile from step %d to %d in %s", *self._span, out)
