"""Test that README and the book are short, and that their links, navigation and reference are not dead."""

from __future__ import annotations

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
_BLOCK = re.compile(r"^ *```.*?^ *```", re.M | re.S)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)]*)\)")


def test_readme_and_the_book_are_short():
  words = lambda path: len(path.read_text(encoding="utf-8").split())
  assert words(README) <= MOST_WORDS["README"] and sum(map(words, BOOK)) <= MOST_WORDS["book"]


def test_every_page_is_in_the_navigation_once():
  def pages_of(entries: list) -> Iterator[str]:
    for entry in entries:
      for value in entry.values() if isinstance(entry, dict) else [entry]:
        yield from pages_of(value) if isinstance(value, list) else [value]

  listed = sorted(page for page in pages_of(NAV) if page.endswith(".md"))
  written = [str(path.relative_to(ROOT / "docs")) for path in pages.DOCS]
  of_replication = [str(path.relative_to(ROOT)) for path in (ROOT / "replication").rglob("*.md")]
  assert listed == sorted([*written, *of_replication, "tour.md"])  # docs/tour_page.py makes tour.md from the notebook


@pytest.mark.parametrize("path", [README, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_to_existing_files(path):
  """Check the links that mkdocs does not check, which are those outside docs/."""
  targets = [target for _, target in _LINK.findall(_BLOCK.sub("", path.read_text(encoding="utf-8")))]
  targets += re.findall(r'(?:src|srcset)="([^"]+)"', path.read_text(encoding="utf-8"))
  paths = [target.partition("#")[0] for target in targets if not re.match(r"https?:|#|mailto:", target)]
  assert paths and [target for target in paths if not (path.parent / target).exists()] == []


def test_the_modules_of_the_reference_exist():
  named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
  files = [ROOT / name.replace(".", "/") for name in named]
  assert len(named) > 30
  assert [str(file) for file in files if not (file.with_suffix(".py").exists() or file.is_dir())] == []
  assert [str(file) for file in files if file.is_dir() and not (file / "__init__.py").read_text().strip()] == []
