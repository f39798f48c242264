"""The checker of annotations that conftest.py installs: beartype, to which an int is a float too, as PEP 484 has it.

jaxtyping's own decorator has two functions checked in the place of each, the arguments in both, and binds a call's
arguments to their names for what few annotations need. That is most of what the checks cost, and a sixth of the time of
the tests' own process. Here one check of each call stands in its scope of axes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped
_AXES = _jaxtyped("context")  # in which an axis's name has one size; it has no state of its own


def install() -> None:
  """Before any module of the package is imported: shapes, dtypes and types of all its functions are then checked."""
  jaxtyping.install_import_hook("diffdis_jax", "tests.typechecking.check")
  jaxtyping.jaxtyped = lambda *, typechecker: checked  # which that hook puts before each function and class


def checked(made: Any) -> Any:
  """A function, or the class of a dataclass, whose calls are checked; another class as it is."""
  if isinstance(made, type):
    if dataclasses.is_dataclass(made) and not hasattr(made.__init__, "checked"):
      made.__init__ = checked(made.__init__)
    return made
  written = made.__annotations__
  if not written:
    return made
  # A generator's arguments are to be checked at the call; and only jaxtyping knows arguments as sizes, "{n}".
  if inspect.isgeneratorfunction(made) or any("{" in str(each) for each in written.values()):
    return _jaxtyped(made, typechecker=check)
  made.__annotations__ = _meant(made)
  inner = check(made)
  made.__annotations__ = written

  @functools.wraps(made)
  def call(*args: Any, **kwargs: Any) -> Any:
    with _AXES:
      return inner(*args, **kwargs)

  call.checked = True  # pyright: ignore[reportFunctionMemberAccess]
  return call


def _meant(function: Callable) -> dict[str, Any]:
  """What its annotations are evaluated to; anything where that is not known yet, as of the class that is being made."""
  names, found = function.__globals__, {}
  for name, annotation in function.__annotations__.items():
    try:
      found[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
    except Exception:  # as jaxtyping does it
      found[name] = Any
  return found
