"""README and the pages in docs/ are short and found in the site.

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
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

MOST_WORDS = {"README": 400, "book": 10_000}
MOST_LINES = 90  # of README
_BLOCK = re.compile(r"^ *```.*?^ *```", re.M | re.S)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)]*)\)")


def words(text: str) -> int:
  """As wc counts them."""
  return len(text.split())


def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def test_readme_is_short():
  text = README.read_text(encoding="utf-8")
  assert words(text) <= MOST_WORDS["README"]
  assert len(text.splitlines()) <= MOST_LINES


def test_the_book_is_short():
  counts = {path.name: words(path.read_text(encoding="utf-8")) for path in BOOK}
  assert sum(counts.values()) <= MOST_WORDS["book"], counts


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


def test_the_six_boxes_of_a_step_are_functions_of_the_code():
  """Find each box, FILE.FUNCTION or FILE.CLASS.METHOD, among the definitions of a file of that name."""

  def defined(path: pathlib.Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}

  text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
  boxes = re.findall(r"^│ (\w+)\.([\w.]+) +│", text, re.M)
  assert len(boxes) == 6
  for file, dotted in boxes:
    paths = (ROOT / "diffdis_jax").rglob(f"{file}.py")
    assert any({*dotted.split(".")} <= defined(path) for path in paths), f"no {file}.py has {dotted}"
