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
  """Classes of a set in torchvision's order.

  Attributes:
    set_name: in CLIP_benchmark's words.
    classnames: what goes into the prompts: OpenAI's, except Pets and EuroSAT (CLIP_benchmark's) in another order.
    templates: OpenAI's prompt templates, `{}` for the class name.
    names_in_data: what folders and files of the data call the same classes; empty where it is the same.
  """

  set_name: str
  classnames: tuple[str, ...]
  templates: tuple[str, ...]
  names_in_data: tuple[str, ...] = ()


@functools.cache
def load() -> dict[str, ClassList]:
  """Read the classes of each set, in the order of the suite's table. zero_shot_sets.LICENSE has its sources."""
  text = importlib.resources.files("diffdis_jax.data.layouts").joinpath("zero_shot_sets.json").read_text("utf-8")
  return {
    name: ClassList(name, **{field: tuple(values) for field, values in lists.items()})
    for name, lists in json.loads(text).items()
  }


def normalised(name: str) -> str:
  """Return what all spellings of a class name share: `/a/apse/indoor` is `apse indoor`, `F-16A_B` is `f 16a b`."""
  # First of all the letter that SUN397's paths begin with, which is no part of the name.
  name = name.strip()
  return " ".join(_SIGNS.split(name[3:] if _LETTER.match(name) else name)).strip().lower()


def match(names: Sequence[str], known: ClassList, *, where: str) -> Int[np.ndarray, " k"]:
  """Find the place in `known` of each class of the data.

  Args:
    names: of the data, in the data's order; not all of the classes need be there.
    known: of the set.
    where: they are from, for messages.

  Raises:
    UserError: a name that is none of them, one that occurs twice, or one that two classes of the set share while the
      lists differ in order.
  """
  index: dict[str, list[int]] = {}
  # The list's own names first: of a name that both have, its place in the list counts.
  for listed in (known.classnames, known.names_in_data):
    for place, name in enumerate(map(normalised, listed)):
      if place not in index.setdefault(name, []):
        index[name].append(place)
  places: list[int] = []
  for number, name in enumerate(map(normalised, names)):
    if name not in index:
      raise UserError(
        f"{where}: class {number} is {names[number]!r}, which is none of the {len(known.classnames)} classes of"
        f" {known.set_name}, such as {known.classnames[0]!r}"
      )
    # Of a name that several classes share, a class has its own.
    is_own = number < len(known.classnames) and name == normalised(known.classnames[number])
    places.append(number if is_own else index[name][0])
  # By name wherever a name is enough. Two classes of one name go by their numbers, which is safe only where all others
  # stand in the usual order, too.
  if any(len(index[normalised(name)]) > 1 for name in names):
    for number, place in enumerate(places):
      if number != place:
        raise UserError(
          f"{where} has a class list of another order: class {number} is {names[number]!r}, which should be class"
          f" {place}; as two classes have one name, {known.set_name} needs the usual order"
        )
  for number, place in enumerate(places):
    if (first := places.index(place)) != number:
      raise UserError(f"{where} has the classes {names[first]!r} and {names[number]!r}, which are the same class")
  return np.array(places, np.int64)
