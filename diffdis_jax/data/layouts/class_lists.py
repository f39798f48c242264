"""Class names and prompt templates of the twelve zero-shot sets, and which class a name in the data is.

Data sets number the same classes in different orders: Oxford Pets and EuroSAT have two in use. So a label is what the
data call its class, looked up here, and not its number.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from diffdis_jax.errors import UserError

_SIGNS = re.compile(r"[_/\s-]+")
_LETTER = re.compile(r"/[a-z]/")  # in front of SUN397's names


class ClassList(NamedTuple):
  """Classes of a set in torchvision's order."""

  set_name: str  # in CLIP_benchmark's words
  classnames: tuple[str, ...]  # of prompts: OpenAI's, except Pets and EuroSAT (CLIP_benchmark's) in another order
  templates: tuple[str, ...]  # OpenAI's prompt templates, `{}` for the class name
  names_in_data: tuple[str, ...] = ()  # of the same classes in folders and files; empty where it is the same


@functools.cache
def load() -> dict[str, ClassList]:
  """Read the classes of each set, in the order of the suite's table. zero_shot_sets.LICENSE has its sources."""
  text = importlib.resources.files("diffdis_jax.data.layouts").joinpath("zero_shot_sets.json").read_text("utf-8")
  as_tuples = lambda lists: {field: tuple(values) for field, values in lists.items()}
  return {name: ClassList(name, **as_tuples(lists)) for name, lists in json.loads(text).items()}


def normalised(name: str) -> str:
  """Return what all spellings of a class name share: `/a/apse/indoor` is `apse indoor`, `F-16A_B` is `f 16a b`."""
  # First of all the letter that SUN397's paths begin with, which is no part of the name.
  name = name.strip()
  return " ".join(_SIGNS.split(name[3:] if _LETTER.match(name) else name)).strip().lower()


def match(names: Sequence[str], known: ClassList, *, where: str) -> Int[np.ndarray, " k"]:
  """Find the place in `known` of each class of the data, of which not all need be there. `where` they are from is for
  messages. Raises UserError: a name that is none of the set's, one that occurs twice, or one that two classes of the
  set share while the lists differ in order."""
  own = [*map(normalised, known.classnames)]
  index: dict[str, set[int]] = {}
  for listed in (own, map(normalised, known.names_in_data)):
    for place, name in enumerate(listed):
      index.setdefault(name, set()).add(place)
  places: list[int] = []
  for number, name in enumerate(map(normalised, names)):
    if name not in index:
      raise UserError(
        f"{where}: class {number} is {names[number]!r}, which is none of the {len(own)} classes of {known.set_name},"
        f" such as {known.classnames[0]!r}"
      )
    # The list's own names first: of a name that both have, its place in the list counts. Of a name that several classes
    # share, a class has its own.
    is_own = own[number : number + 1] == [name]
    places.append(number if is_own else own.index(name) if name in own else min(index[name]))
  # By name wherever a name is enough. Two classes of one name go by their numbers, which is safe only where all others
  # stand in the usual order, too.
  shared = any(len(index[normalised(name)]) > 1 for name in names)
  for number, place in enumerate(places):
    if shared and number != place:
      raise UserError(
        f"{where} has a class list of another order: class {number} is {names[number]!r}, which should be class"
        f" {place}; as two classes have one name, {known.set_name} needs the usual order"
      )
    if (first := places.index(place)) != number:
      raise UserError(f"{where} has the classes {names[first]!r} and {names[number]!r}, which are the same class")
  return np.array(places, np.int64)
