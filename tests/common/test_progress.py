from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios

import pytest

from diffdis_jax.common import progress


def test_a_line_now_and_then_with_what_is_left(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(progress.logging, "info", lambda text, *values: lines.append(text % values))
  lines: list[str] = []
  done = progress.Progress("embedded", 1000, "images")
  done.pass_over(100)
  for clock[0] in (4.0, 9.0, 11.0, 12.0, 30.0):
    done.add(100)
  assert lines == [
    "embedded 400 of 1000 images, 37 ms each, 22 seconds left",
    "embedded 600 of 1000 images, 60 ms each, 24 seconds left",
  ]
  clock[0] = 3030.0
  done.add(1)
  assert lines[-1] == "embedded 601 of 1000 images, 6.05 s each, 40 minutes left"


WORK = """
import sys, time
from absl import flags, logging
from diffdis_jax.common import progress

flags.FLAGS(sys.argv[:1])
logging.use_absl_handler()
logging.set_verbosity(logging.WARNING if "quiet" in sys.argv else logging.INFO)
progress.DELAY = 0.0
done = progress.Progress("embedded", 40, "images", every=0.0 if "lines" in sys.argv else 10.0)
done.pass_over(10)
for i in range(30):
  done.add(1)
  if i == 15:
    logging.info("a line of the log")
  time.sleep(0.02)
with progress.bar("preparing", 2, "parts") as bar:
  bar.update(1)
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
  assert "s each" not in text, "no lines beside the bar"


@pytest.mark.parametrize("arguments, lines", [(("lines",), 30), (("quiet", "lines"), 0)])
def test_a_log_gets_lines_and_no_bar(arguments, lines):
  done = subprocess.run([sys.executable, "-c", WORK, *arguments], stderr=subprocess.PIPE, text=True, check=True)
  assert "\r" not in done.stderr and done.stderr.count("s each") == lines


def test_quiet_is_quiet_on_a_terminal_too():
  assert on_a_terminal("quiet") == ""
