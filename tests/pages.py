"""Read the commands and Python blocks of README and the pages in docs/."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
WRITTEN = ROOT / "docs" / "tour"  # the notebook writes here, a model card among other files
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if WRITTEN not in path.parents)
BESIDE = sorted((ROOT / "replication").rglob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (*DOCS, *BESIDE)))
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_COMMAND = re.compile(r"(?:^|.* )(?=(?:\.venv/bin/)?(?:python -m|pytest|diffdis |make ))")
_MODULE = "python -m diffdis_jax."
_VARIABLE = re.compile(r'(\w+)="(.*)"')


def commands() -> Iterator[str]:
  """Yield the commands in the blocks of all pages, and those in text that begin with `python -m diffdis_jax.`.

  A command is one line without comments, its variables replaced. A launcher before it is left out.
  """
  for page in PAGES:
    text = (ROOT / page).read_text(encoding="utf-8")
    variables: dict[str, str] = {}
    for language, block in _BLOCK.findall(text):
      if not language:
        yield from _in_block(block, variables)
    for inline in _INLINE.findall(_BLOCK.sub("", text)):
      line = " ".join(inline.split())
      if as_module(line).startswith(_MODULE) and " " in as_module(line).removeprefix(_MODULE):
        yield line


def as_module(line: str) -> str:
  """Rewrite `diffdis COMMAND ...` as `python -m diffdis_jax.COMMAND ...`, and a config's file as its name."""
  return re.sub(r"(--(?:config|base)=)configs/(\w+)\.py", r"\1\2", re.sub(r"^diffdis (?=[a-z])", _MODULE, line))


def python_block(page: str, containing: str) -> str:
  """Return the only Python block of a page that contains this text."""
  text = (ROOT / page).read_text(encoding="utf-8")
  (chosen,) = (block for language, block in _BLOCK.findall(text) if language == "python" and containing in block)
  return chosen


def number_of_python_blocks(page: str) -> int:
  """Count the Python blocks of a page."""
  return sum(language == "python" for language, _ in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")))


def _in_block(block: str, variables: dict[str, str]) -> Iterator[str]:
  for line in re.sub(r" *\\\n *", " ", block).splitlines():
    line = re.sub(r"(^| )#( .*|$)", "", " ".join(line.split())).strip()
    if variable := _VARIABLE.fullmatch(line):
      variables[variable[1]] = variable[2]
    line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
    launcher = None if variable else _COMMAND.match(line)
    if launcher and not re.search(r"diffdis(_jax.| )NAME", line):  # this line belongs to the diagram of the folders
      yield line[launcher.end() :]
