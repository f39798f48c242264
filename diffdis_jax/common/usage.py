"""The text of --help: an example, what the command does, and its flags by group; and writing to stdout.

A group is a heading. Flags outside of any group come first, with those that are required at their top.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import textwrap
import weakref
from collections.abc import Iterator

from absl import flags

WIDTH = 100  # columns, of a terminal
COLUMN = 30  # where a flag's text begins
GENERAL = "Flags"
PROCESSES = "Flags of a run of several processes, where the environment does not set them"
MISSING = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None")  # absl's words
_AUTOMATIC = "must have a value other than None"  # in absl's message of a required flag
_VALUES = {flags.IntegerParser: "N", flags.FloatParser: "X", flags.ListParser: "A,B"}

_wrap = functools.partial(textwrap.fill, break_on_hyphens=False)
_group_of: weakref.WeakKeyDictionary[flags.Flag, str] = weakref.WeakKeyDictionary()
_required: weakref.WeakSet[flags.Flag] = weakref.WeakSet()


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
  """Put the flags that are defined within under this heading."""
  before = {*flags.FLAGS}
  yield
  _group_of.update({flags.FLAGS[name]: title for name in {*flags.FLAGS} - before})


def mark_required(*names: str) -> None:
  """Mark flags that the command itself asks for, and not for every call: absl would ask for them always."""
  _required.update(flags.FLAGS[name] for name in names)


def text(doc: str, program: str) -> str:
  """Return all of --help.

  Args:
    doc: the command's docstring: a sentence, an indented example, and the rest.
    program: the name by which absl knows the command's flags.
  """
  summary, *rest = inspect.cleandoc(doc).split("\n\n")
  example = [textwrap.dedent(rest.pop(0))] if rest else []
  # What is indented, or a table, stays as it is.
  filled = (part if part.startswith((" ", "|")) else _wrap(" ".join(part.split()), WIDTH) for part in [summary, *rest])
  return "\n\n".join([*example, *filled, *_groups(program)]) + "\n"


def write(content: str) -> None:
  """Write to stdout. A reader that has gone, such as head or a pager that was closed, ends no command."""
  if sys.stdout is None:  # closed by whoever started the command
    return
  try:
    sys.stdout.write(content)
    sys.stdout.flush()
  except BrokenPipeError:
    # Or else Python, which flushes again at its end, says that it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def version() -> str:
  """Return the package's name and version."""
  # Looked up and not imported: the package's own file imports this folder.
  return f"diffdis_jax {sys.modules['diffdis_jax'].__version__}"


def _groups(program: str) -> Iterator[str]:
  keys = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(program)}
  shown = [flags.FLAGS[name] for name in flags.FLAGS if name in keys]  # as they were defined
  is_required = lambda flag: flag in _required or any(_AUTOMATIC in each.message for each in flag.validators)
  titles = dict.fromkeys([GENERAL, *(_group_of.get(flag, GENERAL) for flag in shown)])
  for title in sorted(titles, key=lambda title: title == PROCESSES):  # last, and the others as they are
    members = [flag for flag in shown if _group_of.get(flag, GENERAL) == title]
    rows = [_entry(flag, is_required(flag)) for flag in sorted(members, key=lambda flag: not is_required(flag))]
    if title == GENERAL:
      rows += [_row("--version", "write the version and exit")]
    yield "\n".join([_wrap(f"{title}:", WIDTH), *rows])


def _entry(flag: flags.Flag, required: bool) -> str:
  """Return a flag's row: how it is written, such as --name=N, and what it does."""
  if isinstance(flag.parser, flags.EnumParser):
    value = "|".join(flag.parser.enum_values)
  else:
    value = next((value for kind, value in _VALUES.items() if isinstance(flag.parser, kind)), "...")
  form = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={value}"
  help = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))  # without an enum's values, which the form has
  default = "" if flag.default in (None, "", [], False) else f" (default: {str(flag.default_as_str).strip(chr(39))})"
  return _row(form, f"{'(required) ' * required}{help}{default}")


def _row(form: str, help: str) -> str:
  gap = "" if len(form) + 4 <= COLUMN else "\n" + " " * COLUMN  # too long a form stands alone
  indented = _wrap(help, WIDTH - COLUMN).replace("\n", "\n" + " " * COLUMN)
  return f"  {form}{gap or ' ' * (COLUMN - len(form) - 2)}{indented}".rstrip()
