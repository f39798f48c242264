"""README and the pages in docs/ are short, in the field's words, and found in the site; so are docstrings and messages.

replication/log is a dated notebook, to which only the navigation applies.
"""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest
import yaml

from tests import pages

ROOT = pages.ROOT
README = ROOT / "README.md"
BOOK = sorted((ROOT / "docs").glob("*.md"))
CODE = sorted(path for folder in ("diffdis_jax", "configs") for path in (ROOT / folder).rglob("*.py"))
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

MOST_WORDS = {"README": 600, "book": 14_000}
MOST_LINES = 90  # of README
MOST_IN_A_SENTENCE = 35
LONG_SENTENCES = 0.02  # share of all
MOST_NUMBERS = 3  # of a paragraph
MOST_IN_A_FIRST_PARAGRAPH = 40

# Words to leave -> the field's. Honest uses pass: an artist's drawings, noise that is drawn.
PICTURES = r"(?:image|picture|icon|sample|grid|emoji)s?"
AS_SAMPLES = "(?! with replacement| alike)"  # of a data set
LEAVE = {
  r"\b(?:told|tell|tells|telling)(?: \w+){0,3} apart\b": "classified, or accuracy",
  r"\bdrawn right\b": "accuracy of generated images",
  r"\b(?:comes|came) to\b(?! (?:life|itself|rest))": "is, was",
  r"\bbut for\b": "except",
  r"\banew\b": "again",
  rf"\bdraw(?:s|n|ing)? (?:an? |the |its |their |all |more |\d+ )?{PICTURES}\b{AS_SAMPLES}": "generate, generated",
  rf"\b{PICTURES} (?:is |are |was |were |be )?(?:drawn|it draws|that it drew)\b{AS_SAMPLES}": "generated images",
  r"(?<!artists' )(?<!line )\bdrawings\b(?! of \d)": "generated images",
  r"\bdraws what\b|\bdraw a prompt\b": "generates, generate",
  r"\b(?:is|are|was|were) told\b": "is reported",
  r"\b(?:is|are|be|of) no use\b": "cannot be read",
  r"\bgo(?:es)? on (?:where|from)\b|\bgoes on(?: with the run)?[.;]": "resumes",
  r"\bof a CLIP\b(?! (?:run|model|baseline|checkpoint|network|config))": "for CLIP",
  r"\bformerly\b": "say it as it was",
  r"\bthe (?:PyTorch |Torch )?twin\b": "the PyTorch model",
}

_BLOCK = re.compile(r"^ *```.*?^ *```", re.M | re.S)
_NO_WORDS = re.compile(r"<!--.*?-->|<[^>]+>|^:::.*$", re.M | re.S)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)]*)\)")
_SENTENCE = re.compile(r"(?<=[.!?])[)\"*]*\s+(?=[\"'*(\[]*[`A-Z0-9])")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ")
# What has a number in its name; and then numbers that stand alone, with their decimals.
_NAMES = "Algorithms?|Tables?|Figures?|section|stage|seed|Python|CUDA"
_NAMED = re.compile(rf"`[^`]*`|\b(?:{_NAMES}) \d+(?:(?:, | and | to )\d+)*")
_NUMBER = re.compile(r"(?<![\w.,/@:-])\d+(?:[.,]\d+)*(?![\w/]|-\w)")


def words(text: str) -> int:
  """As wc counts them."""
  return len(text.split())


def plain(path: pathlib.Path) -> str:
  """A page without blocks of code, HTML and the targets of links."""
  return _LINK.sub(r"\1", _NO_WORDS.sub("", _BLOCK.sub("", path.read_text(encoding="utf-8"))))


def paragraphs(path: pathlib.Path) -> Iterator[str]:
  """Prose: paragraphs and items of lists, without headings, tables and the lines that begin admonitions."""
  for block in re.split(r"\n\s*\n", plain(path)):
    found: list[list[str]] = []
    for line in block.splitlines():
      if not line.strip() or re.match(r"\s*(?:#|\||!!!|\?\?\?)", line):
        continue
      if not found or _ITEM.match(line):
        found.append([])
      found[-1].append(_ITEM.sub("", line).strip())
    yield from (" ".join(lines) for lines in found)


def cells(path: pathlib.Path) -> Iterator[str]:
  """Cells of tables."""
  for line in plain(path).splitlines():
    if line.lstrip().startswith("|"):
      yield from (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))


def long(sentences: list[str]) -> list[str]:
  return [sentence for sentence in sentences if words(sentence) > MOST_IN_A_SENTENCE]


def strings(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Docstrings and messages of a file, each in one line."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.lineno, " ".join(node.value.split())


def to_leave(text: str) -> list[str]:
  """What stands in a text, with what to write instead."""
  return [
    f"'{found[0]}' -> {instead}" for pattern, instead in LEAVE.items() for found in re.finditer(pattern, text, re.I)
  ]


def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def test_readme_is_short():
  text = README.read_text(encoding="utf-8")
  assert words(text) <= MOST_WORDS["README"]
  assert len(text.splitlines()) <= MOST_LINES


def test_the_book_is_short():
  counts = {path.name: words(path.read_text(encoding="utf-8")) for path in BOOK}
  assert sum(counts.values()) <= MOST_WORDS["book"], counts


@pytest.mark.parametrize("path", [README, *BOOK], ids=name_of)
def test_a_page_has_the_fields_words(path):
  assert to_leave(" ".join(plain(path).split())) == []


def test_docstrings_and_messages_have_the_fields_words():
  found = [
    f"{name_of(path)}:{line}: {said}" for path in CODE for line, text in strings(path) for said in to_leave(text)
  ]
  assert found == []


@pytest.mark.parametrize(
  "said",
  [
    "Pairs are told apart.",
    "It tells two classes apart.",
    "which came to 3 %",
    "all but for two",
    "made anew",
    "drawn images",
    "draws images from text",
    "images that it drew",
    "drawings of unseen pairs",
    "the parameters of a CLIP are read",
    "users are told why",
    "it goes on where it stopped",
  ],
)
def test_words_to_leave_are_found(said):
  assert to_leave(said)


@pytest.mark.parametrize(
  "said",
  [
    "Six artists' drawings of 1,206 concepts",
    "a drawing of the {}.",
    "at whatever t_e was drawn",
    "The loss is all but zero.",
    "of a CLIP run",
    "draws a random box",
    "Images are drawn with replacement.",
    "line drawings of emoji",
  ],
)
def test_honest_words_pass(said):
  assert to_leave(said) == []


def test_sentences_are_short():
  prose = [sentence for path in (README, *BOOK) for text in paragraphs(path) for sentence in _SENTENCE.split(text)]
  in_tables = [sentence for path in (README, *BOOK) for text in cells(path) for sentence in _SENTENCE.split(text)]
  assert len(prose) > 200
  found = long(prose) + long(in_tables)
  assert len(found) <= LONG_SENTENCES * len(prose), "\n\n".join(found)


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "results.md"], ids=name_of)
def test_numbers_stand_in_tables(path):
  found = [text for text in paragraphs(path) if len(_NUMBER.findall(_NAMED.sub("", text))) > MOST_NUMBERS]
  assert found == []


@pytest.mark.parametrize("path", [README, *pages.DOCS], ids=name_of)
def test_no_line_of_prose_begins_with_a_comment(path):
  """With which Markdown ends the paragraph before it."""
  assert re.findall(r"^\s*<!--=.*", path.read_text(encoding="utf-8"), re.M) == []


@pytest.mark.parametrize("path", BOOK, ids=name_of)
def test_a_page_begins_with_whom_it_is_for(path):
  """A heading, and one short paragraph."""
  blocks = [block for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip()) if block.strip()]
  assert blocks[0].startswith("# ") and "\n" not in blocks[0]
  assert re.match(r"[A-Z]", blocks[1]), f"{name_of(path)} begins with {blocks[1]!r}"
  assert words(_LINK.sub(r"\1", blocks[1])) <= MOST_IN_A_FIRST_PARAGRAPH


def test_every_page_is_in_the_navigation_once():
  def of(entries: list) -> Iterator[str]:
    for entry in entries:
      for value in entry.values() if isinstance(entry, dict) else [entry]:
        yield from of(value) if isinstance(value, list) else [value]

  found = sorted(page for page in of(NAV) if page.endswith(".md"))
  there = [str(path.relative_to(ROOT / "docs")) for path in pages.DOCS]
  beside = [str(path.relative_to(ROOT)) for path in (ROOT / "replication").rglob("*.md")]
  assert found == sorted([*there, *beside, "tour.md"])  # the notebook, which docs/tour_page.py makes a page


@pytest.mark.parametrize("path", [README, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_to_files(path):
  """Those within docs/ are mkdocs' to check."""
  targets = [target for _, target in _LINK.findall(_BLOCK.sub("", path.read_text(encoding="utf-8")))]
  targets += re.findall(r'(?:src|srcset)="([^"]+)"', path.read_text(encoding="utf-8"))
  found = [target for target in targets if not re.match(r"https?:|#|mailto:", target)]
  assert found and [target for target in found if not (path.parent / target.partition("#")[0]).exists()] == []


def test_the_modules_of_the_reference_exist():
  named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
  files = [ROOT / name.replace(".", "/") for name in named]
  assert len(named) > 30
  assert [str(file) for file in files if not (file.with_suffix(".py").exists() or file.is_dir())] == []
  assert [str(file) for file in files if file.is_dir() and not (file / "__init__.py").read_text().strip()] == []
