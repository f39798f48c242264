"""The commands and Python blocks that README and the pages in docs/ show."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
WRITTEN = ROOT / "docs" / "tour"  # by the notebook, a model card among it
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if WRITTEN not in path.parents)
BESIDE = sorted((ROOT / "replication").rglob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (*DOCS, *BESIDE)))
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_COMMAND = re.compile(r"(?:^|.* )(?=(?:\.venv/bin/)?(?:python -m|pytest|diffdis |make ))")
_MODULE = "python -m diffdis_jax."
_VARIABLE = re.compile(r'(\w+)="(.*)"')


@dataclasses.dataclass(frozen=True)
class Command:
  """A line of a page.

  Attributes:
    page: where it stands.
    line: from the command's name on, in one line, its variables replaced, without comments.
    launcher: what stands before it, such as `launch/tpu_pod.sh run --`.
  """

  page: str
  line: str
  launcher: str


def commands() -> Iterator[Command]:
  """Of every page: in a block, or in the text from `python -m diffdis_jax.` on."""
  for page in PAGES:
    text = (ROOT / page).read_text(encoding="utf-8")
    variables: dict[str, str] = {}
    for language, block in _BLOCK.findall(text):
      if not language:
        yield from _in_block(page, block, variables)
    for inline in _INLINE.findall(_BLOCK.sub("", text)):
      line = " ".join(inline.split())
      if as_module(line).startswith(_MODULE) and " " in as_module(line).removeprefix(_MODULE):
        yield Command(page, line, "")


def as_module(line: str) -> str:
  """`diffdis COMMAND ...` as `python -m diffdis_jax.COMMAND ...`, and a config's file by its name."""
  return re.sub(r"(--(?:config|base)=)configs/(\w+)\.py", r"\1\2", re.sub(r"^diffdis (?=[a-z])", _MODULE, line))


def python_block(page: str, containing: str) -> str:
  """The page's only block of Python with this text in it."""
  text = (ROOT / page).read_text(encoding="utf-8")
  (found,) = (block for language, block in _BLOCK.findall(text) if language == "python" and containing in block)
  return found


def number_of_python_blocks(page: str) -> int:
  """How many the page has."""
  return sum(language == "python" for language, _ in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")))


def _in_block(page: str, block: str, variables: dict[str, str]) -> Iterator[Command]:
  for line in re.sub(r" *\\\n *", " ", block).splitlines():
    line = re.sub(r"(^| )#( .*|$)", "", " ".join(line.split())).strip()
    if variable := _VARIABLE.fullmatch(line):
      variables[variable[1]] = variable[2]
    line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
    found = None if variable else _COMMAND.match(line)
    if found and not re.search(r"diffdis(_jax.| )NAME", line):  # which is of the drawing of the folders
      yield Command(page, line[found.end() :], line[: found.end()].strip())
