from __future__ import annotations

import contextlib
import gzip
import json
import tempfile

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from diffdis_jax.errors import UserError
from diffdis_jax.run import profile
from tests.bucket_faults import away


@pytest.mark.parametrize("text", ["", "5", "a:b", "0:3", "3:0", "-1:2", "2.5:1", "1:2:3"])
def test_what_is_no_span_of_steps_is_refused(text):
  with pytest.raises(UserError, match=f"--profile={text} should be START:STEPS, such as 100:5"):
    profile.parse(text, num_steps=1000)


def test_a_span_lies_within_the_run():
  assert profile.parse("98:3", num_steps=100) == profile.Span(98, 3)
  with pytest.raises(UserError, match="--profile=98:4 ends at step 101; the run ends at step 100"):
    profile.parse("98:4", num_steps=100)


def take_steps(profiler: profile.Profiler, steps: range) -> list[int]:
  """Takes steps of matrix products; returns after which of them the trace was to be written."""
  f, x, ended = jax.jit(lambda x: x @ x / 100), jnp.ones((100, 100)), []
  for step in steps:
    profiler.before(step, x)
    x = f(x)
    if profiler.after(step):
      jax.block_until_ready(x)
      profiler.close()
      ended.append(step)
  return ended


# Of jaxlib 0.12 on Python 3.13; as an error it would end the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_the_trace_holds_the_steps_of_the_span_and_nothing_else(tmp_path):
  profiler = profile.Profiler(profile.Span(3, 2), tmp_path, start_step=0)
  assert take_steps(profiler, range(1, 8)) == [4]
  profiler.close()  # as at the end of a run
  folder = tmp_path / "plugins" / "profile" / "step_00000003"
  assert sorted(path.name for path in folder.iterdir()) == ["host_000.trace.json.gz", "host_000.xplane.pb"]
  # What Perfetto reads.
  events = json.loads(gzip.decompress((folder / "host_000.trace.json.gz").read_bytes()))["traceEvents"]
  assert sorted(event["args"]["step_num"] for event in events if event.get("name") == "train") == ["3", "4"]
  # What xprof reads.
  data = jax.profiler.ProfileData.from_file(str(folder / "host_000.xplane.pb"))
  traced = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
  assert sorted(dict(event.stats)["step_num"] for event in traced) == [3, 4]


def test_a_run_that_ends_within_the_span_keeps_what_was_traced(tmp_path):
  profiler = profile.Profiler(profile.Span(2, 5), tmp_path, start_step=0)
  assert take_steps(profiler, range(1, 4)) == []
  profiler.close()
  assert (tmp_path / "plugins" / "profile" / "step_00000002" / "host_000.xplane.pb").stat().st_size > 0


@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, caplog):
  (tmp_path / "plugins").write_text("")
  profiler = profile.Profiler(profile.Span(1, 1), tmp_path, start_step=0)
  assert take_steps(profiler, range(1, 3)) == [1]
  profiler.close()
  assert [record.getMessage() for record in caplog.records] == [
    f"no profile: cannot write {tmp_path}/plugins/profile/step_00000001: Not a directory"
  ]


@pytest.mark.parametrize("said, ends", [("No space left on device", False), ("a bug", True)])
def test_a_temporary_folder_that_is_full_ends_no_run(tmp_path, monkeypatch, caplog, said, ends):
  def full():
    raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: /tmp/profile/vm.xplane.pb; {said}")

  monkeypatch.setattr(jax.profiler, "stop_trace", full)
  profiler = profile.Profiler(profile.Span(1, 1), tmp_path, start_step=0)
  profiler._folder = tempfile.TemporaryDirectory()
  with pytest.raises(jax.errors.JaxRuntimeError) if ends else contextlib.nullcontext():
    profiler.close()
  assert caplog.messages == [] if ends else caplog.messages[0].endswith(f"/tmp/profile/vm.xplane.pb; {said}")


def test_no_folder_for_temporary_files_ends_no_run(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
  assert take_steps(profile.Profiler(profile.Span(1, 2), tmp_path, start_step=0), range(1, 4)) == []
  assert caplog.messages == ["no profile: cannot make a folder for temporary files: No such file or directory"]


def test_a_bucket_that_is_away_ends_no_run(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
  monkeypatch.setattr(type(epath.Path(tmp_path)), "mkdir", away)
  profiler = profile.Profiler(profile.Span(1, 1), tmp_path, start_step=0)
  profiler._folder = tempfile.TemporaryDirectory()
  profiler.close()
  assert caplog.messages == [f"no profile: cannot write {tmp_path}/plugins/profile/step_00000001: no backend, 503"]


def test_steps_that_were_taken_before_are_not_traced(tmp_path, caplog):
  assert take_steps(profile.Profiler(profile.Span(2, 3), tmp_path, start_step=2), range(3, 6)) == []
  assert "no profile: step 2 was taken before" in caplog.text and not list(tmp_path.iterdir())
