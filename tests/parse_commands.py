"""Parses command lines with the commands' own flags, and goes no further; for an environment without the tests' own.

  python tests/parse_commands.py [--run] <LINES.json

LINES.json: a list of lists, each a command's name and its flags, or `--help`. Writes a list with, for each of them, its
exit code and what it said. With --run, of commands that refuse what they are given, each is run.
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
  """In the place of absl's `app.run`."""
  rest = flags_parser(sys.argv)
  if RUN:
    main(rest)


def outcome(command: Sequence[str]) -> tuple[int, str]:
  """Exit code, and what was said."""
  known, code, said = {*flags.FLAGS}, 0, io.StringIO()
  sys.argv = [command[0], *command[1:]]
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
      runpy.run_module(f"diffdis_jax.{command[0]}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
      code = int(ended.code or 0)
  flags.FLAGS.unparse_flags()
  for name in {*flags.FLAGS} - known:  # the next command has its own of these names
    delattr(flags.FLAGS, name)
  return code, said.getvalue()


app.run = parse_alone
warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: one command has imported the next
json.dump([outcome(command) for command in json.load(sys.stdin)], sys.stdout)
