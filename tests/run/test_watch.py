"""Test that a run that hangs is ended, and that steps can be profiled."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.run import watch
from tests.command_runs import ROOT

HANGS = """
import threading, time
from diffdis_jax.run import watch
def waits_for_a_dead_peer(event): event.wait()
with watch.Watchdog(0):
  pass
with watch.Watchdog(0.5) as dog:
  for _ in range(10):
    time.sleep(0.1)
    dog.alive()
  print("alive", flush=True)
  waits_for_a_dead_peer(threading.Event())
"""


def test_a_process_that_hangs_logs_its_place_and_ends_with_code_1():
  done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 1
  assert done.stdout == "alive\n", "the process ended too early"
  assert "in waits_for_a_dead_peer" in done.stderr


@pytest.mark.parametrize("text", ["", "5", "a:b", "0:3", "3:0"])
def test_the_profiled_span_is_two_numbers_within_the_run(text):
  with pytest.raises(UserError, match=f"--profile={text} should be START:STEPS, such as 100:5"):
    watch.parse(text, num_steps=1000)
  assert watch.parse("98:3", num_steps=100) == range(98, 101)
  with pytest.raises(UserError, match="--profile=98:4 ends at step 101; the run ends at step 100"):
    watch.parse("98:4", num_steps=100)


def take_steps(profiler: watch.Profiler, steps: range) -> None:
  """Take steps of matrix products, and profile them as the loop does."""
  f, x = jax.jit(lambda x: x @ x / 100), jnp.ones((100, 100))
  for step in steps:
    profiler.before(step, x)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      x = f(x)
    profiler.after(step, x)
  profiler.close()  # a run closes the profiler at its end


# jaxlib 0.12 warns on Python 3.13; as an error, the warning would end the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_the_trace_holds_only_the_steps_of_the_span(tmp_path):
  take_steps(watch.Profiler(range(3, 5), tmp_path, start_step=0), range(1, 8))
  folder = tmp_path / "plugins" / "profile" / "step_00000003"
  assert sorted(path.name for path in folder.iterdir()) == ["host_000.trace.json.gz", "host_000.xplane.pb"]
  # Perfetto reads this file.
  events = json.loads(gzip.decompress((folder / "host_000.trace.json.gz").read_bytes()))["traceEvents"]
  assert sorted(event["args"]["step_num"] for event in events if event.get("name") == "train") == ["3", "4"]
  # xprof reads this file.
  data = jax.profiler.ProfileData.from_file(str(folder / "host_000.xplane.pb"))
  traced = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
  assert sorted(dict(event.stats)["step_num"] for event in traced) == [3, 4]
