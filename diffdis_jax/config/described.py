"""What each field of a config means, and its range: from the sections' docstrings, and from their own checks."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffdis_jax import errors
from diffdis_jax.common import guesses
from diffdis_jax.config.run import Run

SOURCE = "data.source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
  """A field of a config.

  Attributes:
    path: dotted.
    value: this config's.
    range: in words; empty where any value of its type will do.
    meaning: in a sentence; empty for what is named by the config itself, such as an evaluation's settings.
  """

  path: str
  value: Any
  range: str = ""
  meaning: str = ""


def fields_of(run: Run) -> list[Field]:
  """All fields, in the order of the sections; without the sections that this run does not have."""
  return list(_section(run, ""))


def meanings_of(section: type) -> dict[str, str]:
  """The first sentence that a section's docstring, or that of a class that it extends, says of each field."""
  found: dict[str, str] = {}
  for kind in section.__mro__:
    for name, said in said_in(inspect.cleandoc(kind.__doc__ or "")).items():
      # Without the choices' name in the code: the range lists them.
      found.setdefault(name, re.sub(r",? one of [A-Z_]+", "", said))
  return found


def said_in(docstring: str | None) -> dict[str, str]:
  """The first sentence that a docstring's Args, or the Attributes of a dataclass, say of each name."""
  _, *sections = re.split(r"^(?:Args|Attributes):\n", docstring or "", flags=re.MULTILINE)
  found = {}
  # An entry begins two spaces deep, and goes on deeper.
  for entry in re.split(r"^  (?=\w)", "".join(sections).partition("\n\n")[0], flags=re.MULTILINE)[1:]:
    names, _, said = " ".join(entry.split()).partition(": ")
    found |= dict.fromkeys(names.split(", "), re.split(r"\. ", said)[0].removesuffix("."))
  return found


def _section(section: Any, prefix: str) -> Iterator[Field]:
  meanings = meanings_of(type(section))
  with errors.ranges() as ranges:
    dataclasses.replace(section)  # which checks each of its fields once more
  for field in dataclasses.fields(section):
    value, path = getattr(section, field.name), f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      yield from _section(value, f"{path}.")
    elif value is not None:
      # What lies in `source` stands in the section itself, as a config file writes it.
      name, at = ("", prefix) if path == SOURCE else (field.name, f"{path}.")
      for key, each in guesses.fields_of(value).items() if isinstance(value, Mapping) and value else [("", value)]:
        inner = ".".join(filter(None, (name, key)))
        said = next((ranges[known] for known in ranges if known in (inner, f"{inner}[0]")), "")
        meaning = meanings.get(field.name, "")
        yield Field(path=f"{at}{key}" if key else path, value=each, range=said, meaning=meaning)
