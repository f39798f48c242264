"""Parse command lines by the flags of the commands and stop, in an environment without the tests' packages.

  python tests/parse_commands.py [--run] <LINES.json

LINES.json is a list of lists: a command's name and its flags, or `--help`. The output is a list of exit codes and
outputs. With --run the commands are also run, which is meant for commands that refuse their input.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

RUN = "--run" in sys.argv[1:]


def parse_alone(main: Callable[[list[str]], Any], *, flags_parser: Callable[[list[str]], list[str]]) -> None:
  """Parse flags in place of absl's `app.run`."""
  positional = flags_parser(sys.argv)
  if RUN:
    main(positional)


def outcome(command: Sequence[str]) -> tuple[int, str]:
  """Return the exit code and the output of a command."""
  defined, code, output = {*flags.FLAGS}, 0, io.StringIO()
  sys.argv = [command[0], *command[1:]]
  with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
    try:
      runpy.run_module(f"diffdis_jax.{command[0]}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
      code = int(ended.code or 0)
  flags.FLAGS.unparse_flags()
  for name in {*flags.FLAGS} - defined:  # the next command defines flags of the same names
    delattr(flags.FLAGS, name)
  return code, output.getvalue()


app.run = parse_alone
warnings.simplefilter("ignore", RuntimeWarning)  # runpy warns if one command has already imported the next
json.dump([outcome(command) for command in json.load(sys.stdin)], sys.stdout)
