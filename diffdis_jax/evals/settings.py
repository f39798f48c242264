"""Read off an evaluation's constructor which settings it takes, of which type, and, from its docstring, what for.

The constructor is the one place where a setting is named: configs are checked against it, and `evaluate` has a flag for
each.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from diffdis_jax.config.section import check_type
from diffdis_jax.errors import UserError

_LIKE = {int: 0, float: 0.0, bool: False}  # type of a setting -> a value of it
_DEFINE = {
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_boolean,
  str: flags.DEFINE_string,
  Sequence: flags.DEFINE_list,
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """A setting that a flag can give: one value, or a list of texts.

  Attributes:
    kind: a key of `_DEFINE`.
    help: what the docstring says of it.
  """

  kind: Any
  help: str

  def define(self, name: str) -> None:
    """Define its flag, whose value is None where it is not given: defaults stand at the constructor alone."""
    _DEFINE[self.kind](name, None, self.help)


def of(made: Callable[..., Any]) -> dict[str, Setting]:
  """Return the settings of a function or class by name; those without a default, and objects, are none of a flag's."""
  # The docstring is what a reader of the code sees; --help says the same, word for word.
  said = said_in(inspect.getdoc(made))
  section: Any = made
  if dataclasses.is_dataclass(section):  # a section of a config says it at each field
    said |= {each.name: each.metadata["help"] for each in dataclasses.fields(section) if "help" in each.metadata}
  found = {}
  for name, parameter in inspect.signature(made).parameters.items():
    kinds = _kinds(made, name)
    # A text is how a flag gives whatever can be a text: the path of a JSON file instead of a list, say.
    kind = next((kind for kind in _DEFINE if kind in kinds and not (kind is Sequence and str in kinds)), None)
    # What has no default is the data, or a path: the command gives it by flags of its own.
    if parameter.default is not inspect.Parameter.empty and kind is not None:
      found[name] = Setting(kind, said.get(name, ""))
  return found


def merged(by_name: Mapping[str, Mapping[str, Setting]]) -> dict[str, Setting]:
  """Merge the settings of several evaluations, each once; its help says what it is for each of them.

  Args:
    by_name: of each evaluation, its settings.
  """
  kinds = {name: setting.kind for settings in by_name.values() for name, setting in settings.items()}
  said: dict[str, dict[str, list[str]]] = {}  # name -> help -> the tasks of which it is said
  for task, settings in by_name.items():
    for name, setting in settings.items():
      said.setdefault(name, {}).setdefault(setting.help, []).append(task)
  return {
    name: Setting(kind, "; ".join(f"{', '.join(tasks)}: {text}" for text, tasks in said[name].items()))
    for name, kind in kinds.items()
  }


def written(name: str) -> str:
  """Return a setting as the user gives it: --NAME where the command has that flag, in a config the field NAME."""
  return f"--{name}" if name in flags.FLAGS else name


def check(what: str, made: Callable[..., Any], given: Any) -> None:
  """Check that `made` can be called with these settings, each of a type that its signature has. Raises UserError
  otherwise."""
  taken = inspect.signature(made)
  if not isinstance(given, Mapping):
    raise UserError(f"{what} is {given!r}; it should have {', '.join(taken.parameters)}")
  try:
    taken.bind(**given)
  except TypeError as error:
    raise UserError(f"{what}: {error}; it takes {', '.join(taken.parameters)}") from error
  for name, value in given.items():
    kinds = _kinds(made, name)
    # An object is checked by what opens it, which can say what fields it should have.
    if not kinds or kinds[0] in (Any, Mapping) or (value is None and types.NoneType in kinds):
      continue
    if kinds[0] in _LIKE:
      check_type(f"{what}: {name}", value, _LIKE[kinds[0]])
    # A text is a sequence too, of its letters: shots="16" would be 1 and 6.
    elif not isinstance(value, kinds) or (isinstance(value, str) and str not in kinds):
      raise UserError(f"{what}: {name} is {value!r}; it must be {taken.parameters[name].annotation}")


def _kinds(made: Callable[..., Any], name: str) -> tuple[Any, ...]:
  """Return the types of a parameter, without what they are of: of `Sequence[str] | str`, Sequence and str."""
  hints = typing.get_type_hints(made.__init__ if isinstance(made, type) else made)
  if name not in hints:
    return ()
  union = isinstance(hints[name], types.UnionType) or typing.get_origin(hints[name]) is typing.Union
  return tuple(typing.get_origin(kind) or kind for kind in (typing.get_args(hints[name]) if union else [hints[name]]))


def said_in(docstring: str | None) -> dict[str, str]:
  """Return the first sentence that a docstring's Args, or the Attributes of a dataclass, say of each name."""
  _, *sections = re.split(r"^(?:Args|Attributes):\n", docstring or "", flags=re.MULTILINE)
  found = {}
  # An entry begins two spaces deep, and goes on deeper.
  for entry in re.split(r"^  (?=\w)", "".join(sections).partition("\n\n")[0], flags=re.MULTILINE)[1:]:
    names, _, said = " ".join(entry.split()).partition(": ")
    found |= dict.fromkeys(names.split(", "), re.split(r"\. ", said)[0].removesuffix("."))
  return found
