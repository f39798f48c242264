"""Watch the steps of a run: end a process that hangs, and profile some steps for xprof and Perfetto."""

from __future__ import annotations

import contextlib
import faulthandler
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError

SECONDS = 1800.0  # a save may wait 1200 s for its storage (checkpoint.SAVE_TIMEOUT), and so long may a compilation take


class Watchdog:
  """End this process with code 1 if `alive` is not called for `seconds`. Launchers then start the run again.

  A device, a collective with a dead peer or a file system can let a step wait for ever. The stacks of all threads are
  written to stderr first. It is a context manager.

  Args:
    seconds: the longest time that a step, a batch of an evaluation or a save may take; 0 turns the watch off.
  """

  def __init__(self, seconds: float = SECONDS):
    self._seconds = seconds

  def __enter__(self) -> Watchdog:
    self.alive()
    return self

  def __exit__(self, *_: object) -> None:
    faulthandler.cancel_dump_traceback_later()

  def alive(self) -> None:
    """Start the time again, since the process has made progress."""
    if self._seconds:
      faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)  # stderr


def parse(text: str, *, num_steps: int) -> range:
  """Parse START:STEPS, the steps to profile; the first step of a run is 1. Raise UserError if it has another form or is
  not within the run of `num_steps`."""
  start, _, count = text.partition(":")
  if not (start.isdecimal() and count.isdecimal() and int(start) and int(count)):
    raise UserError(f"--profile={text} should be START:STEPS, such as 100:5 for the steps 100 to 104")
  steps = range(int(start), int(start) + int(count))
  if steps[-1] > num_steps:
    raise UserError(f"--profile={text} ends at step {steps[-1]}; the run ends at step {num_steps}")
  return steps


class Profiler:
  """Profile these steps on each process, into plugins/profile/step_START/ of the workdir, where xprof and TensorBoard
  look. Nothing is profiled if the first of the steps is among the `start_step` finished ones."""

  def __init__(self, steps: range, workdir: epath.PathLike, *, start_step: int):
    self._steps, self._workdir, self._traces = steps, buckets.path(workdir), contextlib.ExitStack()
    if steps and steps[0] <= start_step:
      logging.warning("no profile: step %d was taken before; this run resumes after step %d", steps[0], start_step)
      self._steps = range(0)

  def before(self, step: int, running: Any) -> None:
    """Begin the profile before its first step, once `running`, the result of the step before, is computed."""
    if self._steps and step == self._steps[0]:
      self._traces.enter_context(self._trace(running))

  def after(self, step: int, running: Any) -> None:
    """End the profile after its last step."""
    if self._steps and step == self._steps[-1]:
      import jax  # here, since flags are read before jax is imported

      jax.block_until_ready(running)
      self.close()

  def close(self) -> None:
    """Write the profile, if one has begun."""
    self._traces.close()

  @contextlib.contextmanager
  def _trace(self, running: Any) -> Iterator[None]:
    import jax

    jax.block_until_ready(running)
    # The profiler can only write to this machine, and the workdir may be in a bucket.
    with tempfile.TemporaryDirectory(prefix="profile") as folder:
      with jax.profiler.trace(folder):
        yield
      out = self._workdir / "plugins" / "profile" / f"step_{self._steps[0]:08d}"
      out.mkdir(parents=True, exist_ok=True)
      for kind in (".xplane.pb", ".trace.json.gz"):
        for path in pathlib.Path(folder).rglob(f"*{kind}"):
          # Named by the number of the process: two processes on one machine would use the same name.
          (out / f"host_{jax.process_index():03d}{kind}").write_bytes(path.read_bytes())
    logging.info("profile from step %d to %d in %s", self._steps[0], self._steps[-1], out)
