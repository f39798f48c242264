from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios

WORK = """
import sys
from absl import flags, logging
from diffdis_jax.common import progress

flags.FLAGS(sys.argv[:1])
logging.use_absl_handler()
logging.set_verbosity(logging.WARNING if "quiet" in sys.argv else logging.INFO)
progress.DELAY = 0.0
done = progress.Progress("embedded", 40, "images", done=10, every=0.0)
for i in range(30):
  done.add(1)
"""


def lines(*arguments: str) -> list[str]:
  done = subprocess.run([sys.executable, "-c", WORK, *arguments], stderr=subprocess.PIPE, text=True, check=True)
  assert "\r" not in done.stderr
  return done.stderr.splitlines()


def test_a_log_gets_lines_and_a_terminal_a_bar():
  assert len(lines()) >= 30 and lines("quiet") == []
  mine, terminal = pty.openpty()
  termios.tcsetwinsize(terminal, (24, 100))
  subprocess.run([sys.executable, "-c", WORK], stderr=terminal, check=True)
  os.close(terminal)
  text = os.read(mine, 1 << 16).decode()
  os.close(mine)
  assert "40/40" in text and " of 40 images" not in text
