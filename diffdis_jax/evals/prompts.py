"""Class names and prompt templates: the defaults, and reading them from JSON."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float

from diffdis_jax.common import files
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError

# CLIP's plain prompt first: it is the "single template". The others are the seven that forward selection picked from
# eighty in OpenAI's notebook Prompt_Engineering_for_ImageNet.ipynb.
TEMPLATES = (
  "a photo of a {}.",
  "itap of a {}.",
  "a bad photo of the {}.",
  "a origami {}.",
  "a photo of the large {}.",
  "a {} in a video game.",
  "art of the {}.",
  "a photo of the small {}.",
)
_SLOT = re.compile(r"\{c?\}")


def fill(template: str, classname: str) -> str:
  """Put the class name wherever the template says `{}` or `{c}`, as CLIP_benchmark's files do."""
  return _SLOT.sub(lambda _: classname, template)


def of_classes(templates: Sequence[str], names: Sequence[str]) -> list[str]:
  """Return the prompt of each class in the first template, then in the second one, and so on."""
  return [fill(template, name) for template in templates for name in names]


def mean_embedding(by_template: Float[np.ndarray, "t k d"]) -> Float[np.ndarray, "k d"]:
  """Return the mean of unit vectors, normalised again, as CLIP builds its classifier of several templates."""
  mean = by_template.mean(axis=0)
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


class ClassNames(NamedTuple):
  """Classes in an order."""

  names: tuple[str, ...]  # what goes into the prompts
  keys: tuple[str, ...]  # what the data call the same classes
  by_key: bool = False  # whether keys alone tell the classes of the data, not numbers


def comparable(name: str) -> str:
  """Return what two spellings of a class name have in common: underscores are spaces, and neither case counts nor
  whether an accent is a character of its own."""
  return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def _read(path: str, *, what: str) -> Any:
  try:
    return files.read_json(path, f"{what} from {path}")
  except UserError as error:
    raise UserError(f'{error}; give the path of a file that holds them as JSON, such as ["cat", "dog"]') from error


def _are_strings(values: Collection[Any]) -> bool:
  return bool(values) and all(isinstance(value, str) and value for value in values)


def resolve_classnames(classnames: Sequence[str] | Mapping[str, str] | str) -> ClassNames:
  """Return class names given as such or as a JSON file's path: a list, or an object {name in the data: name in the
  prompts}.

  Raises UserError: the file is unreadable, or it is neither.
  """
  names = _read(classnames, what="class names") if isinstance(classnames, str) else classnames
  # An object is keyed by the data's own names, so that the order of the classes does not matter; a list is by number.
  if isinstance(names, Mapping) and _are_strings([*names, *names.values()]):
    return ClassNames(names=tuple(names.values()), keys=tuple(names), by_key=True)
  if not isinstance(names, list | tuple) or not _are_strings(names):
    raise UserError(
      f"class names are {str(names)[:60]}; give a list of texts, or an object {{name in the data: name}} of texts"
    )
  return ClassNames(names=tuple(names), keys=tuple(names))


def sha256(texts: Sequence[str]) -> str:
  """Return the hash of texts in their order."""
  return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def repeated_names(names: Sequence[str]) -> list[str]:
  """Return the names that occur more than once, each once."""
  return [name for name, count in collections.Counter(names).items() if count > 1]


def listed(names: Sequence[str]) -> str:
  """Return the first ten names for a message."""
  return ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")


def resolve_templates(templates: Sequence[str] | str) -> Sequence[str]:
  """Return templates given as such or as a JSON file's path; empty means `TEMPLATES`.

  Raises UserError: the file is unreadable, or a template has no place for the class name.
  """
  if templates and isinstance(templates, str):
    path, templates = templates, _read(templates, what="templates")
    if not isinstance(templates, list) or not _are_strings(templates):
      raise UserError(f'{path} should hold templates as one JSON list of strings, such as ["a photo of a {{}}."]')
  # A template without a slot gives every class the same embedding, and accuracy of chance without an error.
  for template in templates:
    if not isinstance(template, str) or not _SLOT.search(template):
      raise UserError(f"template {template!r} has no place for the class name; write {{}} or {{c}} where it goes")
  return tuple(templates) or TEMPLATES


@functools.lru_cache(16)  # once of the same prompts, though a run in training measures by them again and again
def warn_of_long(prompts: tuple[str, ...], max_length: int, *, what: str = "prompts") -> None:
  """Warn of prompts, or `what` the texts are, of more tokens than the network reads."""
  tokenizer = Tokenizer(max_length)
  cut = {prompt: left for prompt in dict.fromkeys(prompts) if (left := tokenizer.cut(prompt)) is not None}
  for prompt, left in [*cut.items()][:3]:
    logging.warning("this run reads %d tokens: of %r it sees %r", max_length - 2, prompt, left)
  if len(cut) > 3:
    logging.warning("so it is with %d more of the %s", len(cut) - 3, what)
