"""Test that a command ends without waiting for programs that still compile."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize(
  ("error", "code", "message"), [('UserError("no such image")', 2, "error: no such image\n"), ("Preempted", 75, "")]
)
def test_an_end_does_not_wait_for_what_compiles_ahead(error, code, message):
  """The main thread ends while another would compile for a minute."""
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
