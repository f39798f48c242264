"""Programs compile in threads, once, and the log says how long that took."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from diffdis_jax.parallel import programs


@pytest.fixture
def cache(tmp_path):
  """An empty compilation cache, which takes what compiles fast, too."""
  from jax.experimental.compilation_cache import compilation_cache

  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  compilation_cache.reset_cache()
  jax.config.update(names[0], str(tmp_path))
  jax.config.update(names[1], 0.0)
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_a_program_compiles_ahead_of_its_first_call_and_is_waited_for_once(cache, caplog, monkeypatch):
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  met, compiling, arrays = [], threading.Event(), threading.Event()
  monkeypatch.setattr(programs.processes, "barrier", met.append)

  def waiting(lowered, compile=jax.stages.Lowered.compile):
    compiling.set()
    assert arrays.wait(60), "the main thread waits for the compiler"
    return compile(lowered)

  lowered = jax.jit(lambda x: (x * 5).sum()).lower(jax.ShapeDtypeStruct((4,), jnp.float32))
  monkeypatch.setattr(jax.stages.Lowered, "compile", waiting)
  ahead = programs.AheadOfTime("the sum", lowered)
  assert compiling.wait(60)
  x = jnp.ones(4)  # while it compiles
  arrays.set()
  assert ahead.compiled()(x) == 20 and ahead.compiled() is ahead.compiled()
  assert [message.split()[0] for message in caplog.messages] == ["compiling", "compiled"]
  assert met == ["compiled the sum"]


def test_it_says_that_it_still_compiles(caplog, monkeypatch):
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  monkeypatch.setattr(programs, "LOG_EVERY", 0.05)

  def slow(lowered, compile=jax.stages.Lowered.compile):
    time.sleep(0.5)
    return compile(lowered)

  lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(4))
  monkeypatch.setattr(jax.stages.Lowered, "compile", slow)
  programs.AheadOfTime("the sum", lowered).compiled()
  assert sum("compiling the sum, 0 s so far" in message for message in caplog.messages) >= 2


def test_what_fails_in_compiling_ahead_fails_where_it_is_needed(monkeypatch):
  def fails(_):
    raise ValueError("no such shape")

  lowered = jax.jit(lambda x: x).lower(jnp.ones(4))
  monkeypatch.setattr(jax.stages.Lowered, "compile", fails)
  ahead = programs.AheadOfTime("the sum", lowered)
  with pytest.raises(ValueError, match="no such shape"):
    ahead.compiled()


@pytest.mark.parametrize(
  ("error", "code", "message"), [('UserError("no such image")', 2, "error: no such image\n"), ("Preempted", 75, "")]
)
def test_an_end_does_not_wait_for_what_compiles_ahead(error, code, message):
  """The command's main thread ends while another would compile for a minute."""
  begin = time.monotonic()
  command = [sys.executable, "-c", _ENDS_WHILE_COMPILING.replace("ERROR", error)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == code and done.stderr.endswith(message), done.stderr
  assert time.monotonic() - begin < 45


_ENDS_WHILE_COMPILING = """
import threading, time
from diffdis_jax.common import cli
from diffdis_jax.errors import Preempted, UserError
from diffdis_jax.parallel import programs

def main(argv):
  compiling = threading.Event()
  class Lowered:
    def compile(self):
      compiling.set()
      time.sleep(60)
  programs.AheadOfTime("the sum", Lowered())
  compiling.wait()
  raise ERROR

cli.run(main)
"""
