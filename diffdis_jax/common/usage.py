"""What --help writes: an example first, then what the command does, then its flags by group; and writing to stdout.

A group is a heading of --help. Flags outside of any group come first, with those that are required at their top.
"""

from __future__ import annotations

import contextlib
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
REQUIRED = "(required)"
MISSING = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None")  # absl's words
_AUTOMATIC = "must have a value other than None"  # in absl's message of a required flag

_group_of: weakref.WeakKeyDictionary[flags.Flag, str] = weakref.WeakKeyDictionary()
_required: weakref.WeakSet[flags.Flag] = weakref.WeakSet()


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
  """The flags that are defined within stand under this heading."""
  before = {*flags.FLAGS}
  yield
  for name in {*flags.FLAGS} - before:
    _group_of[flags.FLAGS[name]] = title


def mark_required(*names: str) -> None:
  """Marks flags that the command itself asks for, and not for every call: absl would ask for them always."""
  _required.update(flags.FLAGS[name] for name in names)


def is_required(flag: flags.Flag) -> bool:
  """Whether --help marks it: absl asks for it, or `mark_required` named it."""
  return flag in _required or any(_AUTOMATIC in validator.message for validator in flag.validators)


def text(doc: str, program: str) -> str:
  """All of --help.

  Args:
    doc: the command's docstring: a sentence, an indented example, and the rest.
    program: that absl knows the command's flags by.
  """
  summary, *rest = inspect.cleandoc(doc).split("\n\n")
  example = [textwrap.dedent(rest.pop(0))] if rest else []
  return "\n\n".join([*example, *map(_filled, [summary, *rest]), *_groups(program)]) + "\n"


def write(said: str) -> None:
  """Writes to stdout. A reader that has gone, such as head or a pager that was closed, ends no command."""
  if sys.stdout is None:  # closed by whoever started the command
    return
  try:
    sys.stdout.write(said)
    sys.stdout.flush()
  except BrokenPipeError:
    # Or else Python, which flushes again at its end, says that it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def version() -> str:
  """The package's name and version."""
  # Looked up and not imported: the package's own file imports this folder.
  return f"diffdis_jax {sys.modules['diffdis_jax'].__version__}"


def _filled(paragraph: str) -> str:
  """Wrapped to the terminal; what is indented, or a table, stays as it is."""
  return (
    paragraph
    if paragraph.startswith((" ", "|"))
    else textwrap.fill(" ".join(paragraph.split()), WIDTH, break_on_hyphens=False)
  )


def _groups(program: str) -> Iterator[str]:
  keys = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(program)}
  shown = [flags.FLAGS[name] for name in flags.FLAGS if name in keys]  # as they were defined
  titles = dict.fromkeys([GENERAL, *(_group_of.get(flag, GENERAL) for flag in shown)])
  for title in sorted(titles, key=lambda title: title == PROCESSES):  # last, and the others as they are
    members = [flag for flag in shown if _group_of.get(flag, GENERAL) == title]
    lines = [_entry(flag) for flag in sorted(members, key=lambda flag: not is_required(flag))]
    if title == GENERAL:
      lines += [_row("--version", "write the version and exit")]
    yield "\n".join([*textwrap.wrap(f"{title}:", WIDTH), *lines])


def _entry(flag: flags.Flag) -> str:
  said = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))  # an enum's values, which `_form` has
  if is_required(flag):
    said = f"{REQUIRED} {said}"
  if flag.default not in (None, "", [], False):
    said += f" (default: {str(flag.default_as_str).strip(chr(39))})"
  return _row(_form(flag), said)


def _form(flag: flags.Flag) -> str:
  """How the flag is written: --name=N."""
  if flag.boolean:
    return f"--[no]{flag.name}"
  if isinstance(flag.parser, flags.EnumParser):
    return f"--{flag.name}={'|'.join(flag.parser.enum_values)}"
  kinds = {flags.IntegerParser: "N", flags.FloatParser: "X", flags.ListParser: "A,B"}
  return f"--{flag.name}={next((value for kind, value in kinds.items() if isinstance(flag.parser, kind)), '...')}"


def _row(form: str, said: str) -> str:
  lines = textwrap.wrap(said, WIDTH - COLUMN, break_on_hyphens=False) or [""]
  beginning = f"  {form}"
  if len(beginning) + 2 > COLUMN:
    lines.insert(0, "")
  first, *others = lines
  return "\n".join([f"{beginning:{COLUMN}}{first}".rstrip(), *(" " * COLUMN + line for line in others)])
