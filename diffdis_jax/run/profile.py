"""A trace of some steps of a run, which xprof and Perfetto open. Each process writes its own."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError, full_disk, may_pass


class Span(NamedTuple):
  """The steps to trace: `steps` of them, from `start` on; the first step of a run is 1."""

  start: int
  steps: int

  @property
  def last(self) -> int:
    return self.start + self.steps - 1


def parse(text: str, *, num_steps: int) -> Span:
  """Read START:STEPS. Raises UserError if it is something else, or not within the run of `num_steps`."""
  start, _, steps = text.partition(":")
  if not (start.isdecimal() and steps.isdecimal() and int(start) and int(steps)):
    raise UserError(f"--profile={text} should be START:STEPS, such as 100:5 for the steps 100 to 104")
  span = Span(int(start), int(steps))
  if span.last > num_steps:
    raise UserError(f"--profile={text} ends at step {span.last}; the run ends at step {num_steps}")
  return span


class Profiler:
  """Traces the steps of a span. Called around every step of a run, on every process.

  Args:
    span: which; None for none.
    workdir: folder of the run. The traces are in plugins/profile/step_START/ there, where xprof and TensorBoard look.
    start_step: steps finished; the first of the span is not to be among them.
  """

  def __init__(self, span: Span | None, workdir: epath.PathLike, *, start_step: int):
    self._span, self._workdir = span, buckets.path(workdir)
    self._folder: tempfile.TemporaryDirectory[str] | None = None
    self._annotation: Any = None
    if span and span.start <= start_step:
      logging.warning("no profile: step %d was taken before; this run resumes after step %d", span.start, start_step)
      self._span = None

  def before(self, step: int, running: Any) -> None:
    """Begin this step, before its data. The first step of the span waits for `running`, the result of the last one."""
    if self._span is None or not self._span.start <= step <= self._span.last:
      return
    if self._folder is None:
      # Else the trace would begin within the steps before.
      jax.block_until_ready(running)
      # The profiler writes to this machine alone, and the workdir may be in a bucket.
      try:
        self._folder = tempfile.TemporaryDirectory(prefix="profile")
      except OSError as error:  # full, or none that can be written: worth no run
        logging.warning("no profile: cannot make a folder for temporary files: %s", error.strerror or error)
        self._span = None
        return
      jax.profiler.start_trace(self._folder.name)
    self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
    self._annotation.__enter__()

  def after(self, step: int) -> bool:
    """End this step. Returns whether it was the last one of the span: wait for it, and `close`."""
    if self._annotation is not None:
      self._annotation.__exit__(None, None, None)
      self._annotation = None
    return self._folder is not None and self._span is not None and step == self._span.last

  def close(self) -> None:
    """Write the trace, if there is one."""
    if self._folder is None or self._span is None:
      return
    folder, self._folder = self._folder, None
    out = self._workdir / "plugins" / "profile" / f"step_{self._span.start:08d}"
    with folder:
      try:
        jax.profiler.stop_trace()  # which writes into the folder
        out.mkdir(parents=True, exist_ok=True)
        for path in pathlib.Path(folder.name).rglob("*"):
          for kind in (".xplane.pb", ".trace.json.gz"):
            if path.name.endswith(kind):
              # By the number of the process: two on one machine would give one name by themselves.
              (out / f"host_{jax.process_index():03d}{kind}").write_bytes(path.read_bytes())
      except Exception as error:  # which is worth no run
        if not (may_pass(error) or isinstance(error, OSError) or full_disk(error)):
          raise
        logging.warning("no profile: cannot write %s: %s", out, getattr(error, "strerror", None) or error)
        return
    logging.info("profile of %d steps from step %d on in %s", self._span.steps, self._span.start, out)
