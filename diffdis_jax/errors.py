"""Errors as a user sees them, and ranges of numbers. No jax, so that data workers may import it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

DEEPEST = 64  # levels of JSON: its readers call themselves once a level, and no file of ours has more than ten
PREEMPTED = 75  # EX_TEMPFAIL: launchers start the same command again
INTERRUPTED = 130  # 128 + SIGINT, as shells say it: launchers do not
TERMINATED = 143  # 128 + SIGTERM, of a command that had nothing to save


class UserError(Exception):
  """Bad input. Its message is one line: what is wrong, and what would be right. Verbs exit with code 2."""


class Preempted(Exception):
  """The run was asked to stop, and has saved. Verbs exit with `code`, 75, on which launchers start them again."""

  code = PREEMPTED


class Interrupted(Preempted):
  """The same by Ctrl-C, after which nothing is started again."""

  code = INTERRUPTED


def install(extra: str) -> str:
  """How to get the packages of an extra of pyproject.toml. The project itself is on no package index."""
  return f"pip install -e '.[{extra}]' in the repository's folder"


def not_installed(who: str, package: str, extra: str, *, otherwise: str = "") -> UserError:
  """The error for a missing package of an extra; `otherwise`: what does without it."""
  instead = f", or {otherwise}" if otherwise else ""
  return UserError(f"{who} needs {package}, which is not installed; {install(extra)}{instead}")


class Gone(OSError):
  """What was there a while ago, such as a file of the data, is not there now; it may come back."""


FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
# Of a network, of a server at its other end, or of a disk.
_OF_STORAGE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ETIMEDOUT}
# The last is Linux's alone.
_OF_STORAGE |= {errno.EIO, errno.ESTALE, errno.ENOTCONN, getattr(errno, "EREMOTEIO", errno.EIO)}
# Packages whose errors are all of one; gcsfs raises those of requests too, for a 502.
_NETWORKING = ("aiohttp.", "gcsfs.", "google.auth.", "requests.")


def may_pass(error: BaseException) -> bool:
  """Whether it says that a network, a server or a disk could not be reached, which may be well the next time."""
  known = isinstance(error, (ConnectionError, TimeoutError, Gone)) or getattr(error, "errno", None) in _OF_STORAGE
  return known or type(error).__module__.startswith(_NETWORKING)


def full_disk(error: BaseException | None) -> int | None:
  """Which of FULL_DISK a library's error is of, by its text, where it is no OSError; None where it is of none."""
  return next((number for number in FULL_DISK if os.strerror(number) in str(error)), None)


_ranges: dict[str, str] | None = None  # that `ranges` is collecting


@contextlib.contextmanager
def ranges() -> Iterator[dict[str, str]]:
  """Collects name -> range, in words, of every check of a value that is made meanwhile: `config show` prints them."""
  global _ranges
  _ranges, before = {}, _ranges
  try:
    yield _ranges
  finally:
    _ranges = before


def _says(name: str, said: str) -> None:
  if _ranges is not None and said:
    _ranges[name] = said


def check_number(
  name: str,
  value: Any,
  *,
  at_least: float = -math.inf,
  at_most: float = math.inf,
  above: float = -math.inf,
  below: float = math.inf,
) -> None:
  """Raises UserError unless the value is a finite number within all of the limits; `name` is that of its config field.

  `above` and `below` are limits that the value must not reach.
  """
  limits = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
  said = " and ".join(f"{words} {limit:.10g}" for words, limit in limits if math.isfinite(limit))
  _says(name, said)
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  is_long = isinstance(value, int) and abs(value) >= 2**63  # which no array holds
  if number and not is_long and math.isfinite(value) and at_least <= value <= at_most and above < value < below:
    return
  if number and is_long and not math.isfinite(at_most):
    said = " and ".join(filter(None, (said, f"at most {2**63 - 1:.10g}")))
  raise UserError(f"{name} is {value!r}; it must be {said or 'a finite number'}")


_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", dict: "a section of fields"}


def check_type(name: str, value: Any, like: Any) -> None:
  """Raises UserError unless the value is of the type of `like`, a field's default: of a section with its fields, of a
  sequence with its elements, which are texts where the default is empty.

  A whole number may stand for a number, a list for a tuple. A section's fields that `like` has not are left alone;
  those of an empty one are sections.
  """
  if isinstance(like, (tuple, list)):
    if not isinstance(value, (tuple, list)):
      raise UserError(f"{name} is {value!r}; it must be a sequence{f', such as {like!r}' if like else ''}")
    for i, each in enumerate(value):
      check_type(f"{name}[{i}]", each, like[0] if like else "")
      if like and isinstance(like[0], tuple) and len(each) != len(like[0]):
        raise UserError(f"{name}[{i}] is {each!r}; it must have {len(like[0])} elements, such as {like[0]!r}")
    return
  kind = next(kind for kind in _WORDS if isinstance(like, kind))
  taken = (int, float) if kind is float else kind
  if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f"{name} is {value!r}; it must be {_WORDS[kind]}{f', such as {like!r}' if like else ''}")
  if isinstance(value, dict):
    for field, child in value.items():
      path = f"{name}.{field}" if name else field
      if field in like:
        check_type(path, child, like[field])
      elif not like and not isinstance(child, dict):
        raise UserError(f"{path} is {child!r}; it must be {_WORDS[dict]}")


def check_numbers(name: str, values: Any, **limits: float) -> None:
  """Raises UserError unless `values` is a sequence of numbers that `check_number` takes."""
  if not isinstance(values, Sequence) or isinstance(values, str):
    raise UserError(f"{name} is {values!r}; it must be a sequence of numbers, such as (1, 2)")
  for i, value in enumerate(values):
    check_number(f"{name}[{i}]", value, **limits)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
  """Raises UserError unless the value is one of the choices."""
  _says(name, ", ".join(map(str, choices)))
  if value not in choices:
    raise UserError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_regex(name: str, value: str) -> None:
  """Raises UserError unless the value is a regular expression."""
  try:
    re.compile(value)
  except re.error as error:
    raise UserError(f"{name} has {value!r}, which is no regular expression: {error}") from error


def parse_json(text: str | bytes, name: str) -> Any:
  """The value that JSON text stands for.

  Args:
    text: in UTF-8, where it is bytes.
    name: of where it is from, such as its file's, for the message.

  Raises:
    UserError: it is not JSON, or nested more than DEEPEST deep.
  """
  try:
    found = json.loads(text)
    if not _is_deeper(found, DEEPEST):
      return found
  except ValueError as error:  # bytes that are no text among them
    raise UserError(f"{name} is not JSON: {error}") from error
  except RecursionError:
    pass  # deeper than Python's own reader goes
  raise UserError(f"{name} is not JSON of this project: it is nested more than {DEEPEST} deep")


def _is_deeper(value: Any, depth: int) -> bool:
  if not isinstance(value, (dict, list)):
    return False
  inside = value.values() if isinstance(value, dict) else value
  return depth == 0 or any(_is_deeper(each, depth - 1) for each in inside)


Section = TypeVar("Section")


def read_section(kind: type[Section], values: Any, name: str) -> Section:
  """A config's section as the dataclass of the code that uses it; the dataclass itself checks each field.

  Args:
    kind: a dataclass. Its checks raise UserError with a message that begins with the field's name.
    values: field -> value.
    name: of the section, such as `optim`, which is put before the field's name.

  Raises:
    UserError: a field that the section does not have, a missing one, or a value out of its range.
  """
  dataclass: Any = kind
  if not isinstance(values, Mapping):
    raise UserError(f"{name} is {values!r}; it must be {_WORDS[dict]}")
  known = {field.name for field in dataclasses.fields(dataclass)}
  if unknown := sorted(values.keys() - known):
    raise UserError(f"{name} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
  try:
    return kind(**values)
  except TypeError as error:
    raise UserError(f"{name}: {error}") from error
  except UserError as error:
    raise UserError(f"{name}.{error}") from error
