"""What a user is told when something is wrong, and ranges of numbers. No jax, so that data workers may import it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

PREEMPTED = 75  # EX_TEMPFAIL: launchers start the same command again
INTERRUPTED = 130  # 128 + SIGINT, as shells say it: launchers do not


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
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if number and math.isfinite(value) and at_least <= value <= at_most and above < value < below:
    return
  limits = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
  said = " and ".join(f"{words} {limit:.10g}" for words, limit in limits if math.isfinite(limit))
  raise UserError(f"{name} is {value!r}; it must be {said or 'a finite number'}")


def check_numbers(name: str, values: Any, **limits: float) -> None:
  """Raises UserError unless `values` is a sequence of numbers that `check_number` takes."""
  if not isinstance(values, Sequence) or isinstance(values, str):
    raise UserError(f"{name} is {values!r}; it must be a sequence of numbers, such as (1, 2)")
  for i, value in enumerate(values):
    check_number(f"{name}[{i}]", value, **limits)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
  """Raises UserError unless the value is one of the choices."""
  if value not in choices:
    raise UserError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_regex(name: str, value: str) -> None:
  """Raises UserError unless the value is a regular expression."""
  try:
    re.compile(value)
  except re.error as error:
    raise UserError(f"{name} has {value!r}, which is no regular expression: {error}") from error


Section = TypeVar("Section")


def read_section(kind: type[Section], values: Mapping[str, Any], name: str) -> Section:
  """A config's section as the dataclass of the code that uses it; the dataclass itself checks each field.

  Args:
    kind: a dataclass. Its checks raise UserError with a message that begins with the field's name.
    values: field -> value.
    name: of the section, such as `optim`, which is put before the field's name.

  Raises:
    UserError: a field that the section does not have, a missing one, or a value out of its range.
  """
  dataclass: Any = kind
  known = {field.name for field in dataclasses.fields(dataclass)}
  if unknown := sorted(values.keys() - known):
    raise UserError(f"{name} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
  try:
    return kind(**values)
  except TypeError as error:
    raise UserError(f"{name}: {error}") from error
  except UserError as error:
    raise UserError(f"{name}.{error}") from error
