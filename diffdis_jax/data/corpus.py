"""Sentences of classes: prompts with the class's name and the text of its Wikipedia page, split and tokenised once.

As VL-LTR (Tian et al., ECCV 2022) reads them: `labels.txt` names the classes, `wiki/desc_<number>.txt` has a page each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from diffdis_jax.data.layouts import class_lists
from diffdis_jax.errors import UserError

LEFT_OUT = ("External links", "References", "Further reading", "Bibliography")
# After a full stop or question mark, before white space or a capital; not after an initial or the like of "e.g."
_BORDER = re.compile(r"(?<=[.?])(?<![A-Z]\.)(?<!\w\.\w[.?])(?=[\sA-Z])")
_SUMMARY = "summary"
Tokenizer = Callable[[Sequence[str]], Int[np.ndarray, "n l"]]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The sentences of every class, in the order of the classes' numbers."""

  classnames: tuple[str, ...]  # as they stand in prompts
  sentences: tuple[tuple[str, ...], ...]  # of each class, in the order of its text

  @property
  def flat(self) -> list[str]:
    """Return all sentences, class by class."""
    return [sentence for own in self.sentences for sentence in own]

  @property
  def labels(self) -> Int[np.ndarray, " m"]:
    """Return the class of each of `flat`."""
    return np.repeat(np.arange(len(self.sentences)), [len(own) for own in self.sentences])


@dataclasses.dataclass(frozen=True)
class Tokens:
  """A corpus as token ids."""

  ids: Int[np.ndarray, "m l"]  # of all sentences, class by class
  starts: Int[np.ndarray, " k1"]  # where each class's begin; last, how many there are

  def draw(self, label: int, rng: np.random.Generator) -> Int[np.ndarray, " l"]:
    """Sample one of the class's sentences, uniformly."""
    return self.ids[rng.integers(self.starts[label], self.starts[label + 1])]


def read_corpus(path: pathlib.Path, *, wordnet: bool) -> Corpus:
  """Read a corpus from a folder with `labels.txt` and `wiki/`.

  `wordnet` says how a line of labels.txt reads. Places: name first, number last. ImageNet: WordNet number first, name
  last, classes in the order of their WordNet numbers. Raises UserError: no labels.txt, a line of another form, a class
  without text, or a text in neither UTF-8 nor GBK.
  """
  names = read_names(path / "labels.txt", wordnet=wordnet)
  files = [(name, path / "wiki" / f"desc_{number}.txt") for number, name in enumerate(names)]
  # Looked for before any is read: a corpus that is half there says how much is missing.
  if missing := [f"{name!r}: no file {file}" for name, file in files if not file.is_file()]:
    raise UserError(
      f"{len(missing)} of {len(names)} classes have no text, the first {missing[0]}; put the whole text corpus there"
    )
  return Corpus(tuple(names), tuple(sentences_of(name, _read_page(file)) for name, file in files))


def sentences_of(name: str, text: str) -> tuple[str, ...]:
  """Return OpenAI's 80 prompts with the class's name, and the sentences of its text. As in VL-LTR the name has a space
  behind it, and the text follows the last prompt without one, so that it must begin with a capital to be a sentence."""
  filled = [template.replace("{}", f"{name} ") for template in class_lists.load()["imagenet1k"].templates]
  return split("\n".join(filled) + text)


def split(text: str) -> tuple[str, ...]:
  """Split a text into sentences, without white space around them."""
  return tuple(sentence.strip() for sentence in _BORDER.split(text) if sentence.strip())


def page_text(page: str) -> str:
  """Return a page's summary and sections, without their titles `== Title ==`, and without the sections of LEFT_OUT. Of
  two sections of one title the later text stands in the earlier one's place, as in VL-LTR."""
  sections, title = {_SUMMARY: []}, _SUMMARY
  for line in filter(None, (line.strip() for line in page.splitlines())):
    # Subsections, which begin with more signs, are sections too.
    if line.startswith("=="):
      title = line.strip("= ")
      sections[title] = []
    else:
      sections[title].append(line)
  return "\n".join("\n".join(lines) for title, lines in sections.items() if title not in LEFT_OUT)


def _read_page(file: pathlib.Path) -> str:
  # UTF-8 first, which refuses what is none; GBK takes almost any bytes for some characters.
  for encoding in ("utf-8", "gbk"):
    with contextlib.suppress(UnicodeDecodeError):
      if (text := page_text(file.read_text(encoding))).strip():
        return text
      raise UserError(f"{file} has no text; a class needs a page, put the whole text corpus there")
  raise UserError(f"{file} is neither UTF-8 nor GBK; download the text corpus again")


def read_names(file: pathlib.Path, *, wordnet: bool) -> list[str]:
  """Read class names in the order of their numbers. Raises UserError: a file that cannot be read, or a gap in them."""
  try:
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wordnet:
      return [row[-1].replace("_", " ") for row in sorted(rows, key=lambda row: row[0])]
    by_number = {int(row[-1]): row[0].replace("_", " ").replace("/", " ") for row in rows}
  except (OSError, ValueError) as error:  # the latter of bytes that are not UTF-8, and of what is no number
    how = "it should name the classes, one a line" + ("" if wordnet else ", with their numbers last")
    raise UserError(f"cannot read {file}: {error}; {how}") from error
  # Images name a class by its number: a gap would shift every class behind it.
  if sorted(by_number) != [*range(len(rows))]:
    raise UserError(f"{file} has {len(rows)} lines, whose numbers should be 0 to {len(rows) - 1}, each once")
  return [by_number[number] for number in range(len(rows))]
