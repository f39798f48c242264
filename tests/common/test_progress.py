from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios

import pytest

WORK = """
import sys, time
from absl import flags, logging
from diffdis_jax.common import progress

flags.FLAGS(sys.argv[:1])
logging.use_absl_handler()
logging.set_verbosity(logging.WARNING if "quiet" in sys.argv else logging.INFO)
progress.DELAY = 0.0
done = progress.Progress("embedded", 40, "images", done=10, every=0.0 if "lines" in sys.argv else 10.0)
for i in range(30):
  done.add(1)
  if i == 15:
    logging.info("a line of the log")
  time.sleep(0.02)
with progress.Progress("preparing", 2, "parts", every=None) as bar:
  bar.add(1)
"""


def on_a_terminal(*arguments: str) -> str:
  """What stands on a terminal to which it writes."""
  mine, its = pty.openpty()
  termios.tcsetwinsize(its, (24, 100))
  process = subprocess.Popen([sys.executable, "-c", WORK, *arguments], stderr=its)
  os.close(its)
  written = b""
  try:
    while part := os.read(mine, 1 << 16):
      written += part
  except OSError:  # the other end is closed
    pass
  assert process.wait() == 0
  return written.decode()


def test_a_terminal_gets_a_bar_and_the_lines_of_the_log_above_it():
  text = on_a_terminal()
  assert "embedded" in text and "40/40" in text and "preparing" in text
  (line,) = [line for line in text.replace("\r", "\n").split("\n") if "a line of the log" in line]
  assert "images" not in line, "it does not stand in the bar"
  assert " of 40 images" not in text, "no lines beside the bar"


@pytest.mark.parametrize("arguments, lines", [(("lines",), 31), (("quiet", "lines"), 0)])
def test_a_log_gets_lines_and_no_bar(arguments, lines):
  done = subprocess.run([sys.executable, "-c", WORK, *arguments], stderr=subprocess.PIPE, text=True, check=True)
  assert "\r" not in done.stderr and done.stderr.count("embedded") == lines and "preparing" not in done.stderr


def test_quiet_is_quiet_on_a_terminal_too():
  assert on_a_terminal("quiet") == ""
