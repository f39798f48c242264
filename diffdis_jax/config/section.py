"""Define sections of a config: dataclasses whose fields carry their default, their range and their meaning."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from diffdis_jax.common import guesses
from diffdis_jax.errors import UserError

MISSING = dataclasses.MISSING
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
  "ge": ("at least", operator.ge),
  "gt": ("above", operator.gt),
  "le": ("at most", operator.le),
  "lt": ("below", operator.lt),
}
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", dict: "a section of fields"}
_WITHOUT_DEFAULT = {"int": 0, "bool": False}  # an example value of each type that a field without a default may have


def field(default: Any = MISSING, *, help: str = "", **metadata: Any) -> Any:
  """Define a field of a section.

  Args:
    default: its value in a new config.
    help: its meaning, which `config show` prints.
    **metadata: `range` in words; `check(name, value)`, which raises UserError; `kind`, the class of an optional section
      or a function from its values to the class; `rest=True` for a field that takes the section's unknown fields.
  """
  field_metadata = dict(help=help, **metadata)
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=field_metadata)
  return dataclasses.field(default=default, metadata=field_metadata)


def number(default: Any = MISSING, *, help: str = "", multiple_of: Sequence[str] = (), **limits: float) -> Any:
  """Define a field of a number, or of a sequence or mapping of numbers, each within the limits ge, gt, le, lt, and a
  multiple of the section's fields `multiple_of`."""
  check = functools.partial(check_number, **limits)
  return field(default, help=help, range=_in_words(limits), check=check, multiple_of=multiple_of)


def choice(default: Any, choices: Collection[Any], *, help: str = "") -> Any:
  """Define a field whose value is one of the choices, or a sequence of them."""
  listed = ", ".join(map(str, choices))
  return field(default, help=help, range=listed, check=functools.partial(check_choice, choices=choices))


def regex(default: Any, *, help: str = "") -> Any:
  """Define a field whose value is a regular expression, or a sequence of pairs that begin with one."""
  return field(default, help=help, check=_check_regex)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """A section of a config. Creating one checks the range of each field, and raises UserError with the field's name."""

  def __post_init__(self) -> None:
    for own in dataclasses.fields(self):
      if check := own.metadata.get("check"):
        for name, value in _elements(own.name, getattr(self, own.name)):
          check(name, value)
    for own in dataclasses.fields(self):
      for divisor in own.metadata.get("multiple_of", ()):
        if (value := getattr(self, own.name)) == ():
          raise UserError(f"{own.name} is empty; give one for each level")
        size = getattr(self, divisor)
        if any(element % size for _, element in _elements(own.name, value)):
          raise UserError(f"{own.name} has {value}; it must be a multiple of {divisor}={size}")


def _elements(name: str, value: Any) -> Iterator[tuple[str, Any]]:
  """Yield name and value of each element of a sequence or mapping, or of a single value itself."""
  if isinstance(value, Mapping):
    yield from ((f"{name}.{key}", child) for key, child in value.items())
  elif isinstance(value, (tuple, list)):
    yield from ((f"{name}[{i}]", child) for i, child in enumerate(value))
  else:
    yield name, value


def _in_words(limits: Mapping[str, float]) -> str:
  return " and ".join(f"{words} {limits[key]:.10g}" for key, (words, _) in _LIMITS.items() if key in limits)


def check_number(name: str, value: Any, **limits: float) -> None:
  """Raise UserError unless the value is a finite number within the limits ge, gt, le and lt."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if is_number and isinstance(value, int) and abs(value) >= 2**63:  # it fits in no array
    limits = {"le": 2**63 - 1, **limits}
  elif is_number and math.isfinite(value) and all(_LIMITS[key][1](value, limits[key]) for key in limits):
    return
  raise UserError(f"{name} is {value!r}; it must be {_in_words(limits) or 'a finite number'}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
  """Raise UserError unless the value is one of the choices."""
  if value not in choices:
    raise UserError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def _check_regex(name: str, value: Any) -> None:
  pattern = value if isinstance(value, str) else value[0]
  try:
    re.compile(pattern)
  except re.error as error:
    raise UserError(f"{name} has {pattern!r}, which is no regular expression: {error}") from error


def check_type(name: str, value: Any, like: Any) -> None:
  """Raise UserError unless the value has the type of `like`, a field's default; elements of a sequence are checked too.

  A whole number is accepted as a number, and a list as a tuple. The elements of an empty sequence must be texts.
  """
  such_as = f", such as {like!r}" if like else ""
  if isinstance(like, (tuple, list)):
    if not isinstance(value, (tuple, list)):
      raise UserError(f"{name} is {value!r}; it must be a sequence{such_as}")
    for i, child in enumerate(value):
      check_type(f"{name}[{i}]", child, like[0] if like else "")
      if like and isinstance(like[0], tuple) and len(child) != len(like[0]):
        raise UserError(f"{name}[{i}] is {child!r}; it must have {len(like[0])} elements, such as {like[0]!r}")
    return
  kind = next(kind for kind in _WORDS if isinstance(like, kind))
  accepted = {float: (int, float), dict: Mapping}.get(kind, kind)
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f"{name} is {value!r}; it must be {_WORDS[kind]}{such_as}")


Kind = TypeVar("Kind")
Known = Callable[[], Collection[str]]


def read_section(kind: type[Kind], values: Any, path: str, *, whole: bool = False, known: Known | None = None) -> Kind:
  """Make a section from the values of its fields, and check names, types and ranges.

  Args:
    kind: a dataclass.
    values: values by field.
    path: dotted path of the section, such as `data.augment`; empty for the run's config.
    whole: True if a missing field is an error instead of getting its default.
    known: function that returns the paths of all fields of the config, to guess what an unknown one means.

  Raises:
    UserError: a field is unknown or missing, has another type than its default, or is out of its range.
  """
  check_type(path, values, {})
  fields: dict[str, Any] = {own.name: own for own in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
  prefix = f"{path}." if path else ""
  if rest := next((name for name, own in fields.items() if own.metadata.get("rest")), ""):
    others = {name: value for name, value in values.items() if name == rest or name not in fields}
    values = {name: value for name, value in values.items() if name not in others} | {rest: others}
  fields_read = {}
  for name in [*values, *(name for name in fields if name not in values)]:
    at = path if name == rest else f"{prefix}{name}"
    if name not in fields:
      if known:
        raise UserError(f"unknown config key {at}; {guesses.guess_field(at, known())}")
      raise UserError(f"{path} has no field {name!r}; it has {', '.join(sorted(fields))}")
    section, default = _section_kind(fields[name], values.get(name)), _default(fields[name])
    if name not in values:
      if whole and not (section and default is None):
        raise UserError(f"{at} is missing; every config of a run has it")
      continue
    fields_read[name] = value = values[name]
    if section and not (value is None and default is None):
      fields_read[name] = read_section(section, value, at, whole=whole, known=known)
    elif not section and issubclass(kind, Section):
      fields_read[name] = _value(at, value, default, parts=(default or {}) if name == rest and whole else {})
  try:
    return kind(**fields_read)
  except (TypeError, UserError) as error:  # TypeError is for a missing field
    raise UserError(f"{prefix}{error}") from error


def _value(at: str, value: Any, default: Any, *, parts: Mapping[str, Any]) -> Any:
  """Return a field's value, of its default's type. `parts` are the defaults of what a mapping must contain."""
  check_type(at, value, default)
  for key, child in value.items() if default == {} else ():  # the config itself chooses these names, as for evaluations
    check_type(f"{at}.{key}", child, {})
  for key, child in parts.items():
    if key not in value:
      raise UserError(f"{at}.{key} is missing; every config of a run has it")
    check_type(f"{at}.{key}", value[key], child)
  return normalise(value) if isinstance(default, tuple) else value


def normalise(value: Any) -> Any:
  """Turn lists, as JSON writes tuples, into tuples, so that equal configs compare equal."""
  if isinstance(value, dict):
    return {key: normalise(child) for key, child in value.items()}
  return tuple(map(normalise, value)) if isinstance(value, (list, tuple)) else value


def _default(own: dataclasses.Field[Any]) -> Any:
  """Return a field's default, or a value of its type."""
  if own.default_factory is not MISSING:
    return own.default_factory()
  return _WITHOUT_DEFAULT.get(str(own.type), {}) if own.default is MISSING else own.default


def _section_kind(own: dataclasses.Field[Any], values: Any) -> type | None:
  """Return the class of the section that a field holds; None for another field."""
  kind = own.metadata.get("kind")
  if kind is None:
    return type(own.default) if isinstance(own.default, Section) else None
  return kind if isinstance(kind, type) else kind(values)


def to_dict(section: Section) -> dict[str, Any]:
  """Return a section as nested dicts, without the sections that are absent: the inverse of `read_section`."""
  values = {}
  for own in dataclasses.fields(section):
    value = getattr(section, own.name)
    if own.metadata.get("rest"):
      values = {**value, **values}
    elif value is not None or not own.metadata.get("kind"):
      values[own.name] = to_dict(value) if isinstance(value, Section) else value
  return values


class Line(NamedTuple):
  """A field of a config as `config show` prints it: dotted path, value, range in words and meaning."""

  path: str
  value: Any
  range: str
  meaning: str


def describe(section: Section, prefix: str = "") -> Iterator[Line]:
  """Yield a line for each field of a section, in their order, without the sections that are absent."""
  for own in dataclasses.fields(section):
    value = getattr(section, own.name)
    if isinstance(value, Section):
      yield from describe(value, f"{prefix}{own.name}.")
    elif value is not None:
      # The entries of a `rest` field belong to the section itself, as in a config file.
      for name, child in guesses.fields_of(value if own.metadata.get("rest") else {own.name: value}).items():
        yield Line(f"{prefix}{name}", child, own.metadata.get("range", ""), own.metadata.get("help", ""))
