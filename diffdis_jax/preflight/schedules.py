"""Static cycles of a TPU program's operations, from the schedules that its compiler writes down when asked.

A schedule is a list of bundles, of which one issues a cycle, with loops. Waits for memory are not in it, and what only
runs under a condition counts as if it always ran. It is there for kernels too, of which the compiler has no estimate.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Iterable

from diffdis_jax.common import files

_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*packed-bundles-post-ra.*"
_FILE = re.compile(r"\d+-(?!TLP|<late)(.*)-\d+-packed-bundles-post-ra\.txt")
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s[^{]*\{")
_EXIT = re.compile(r"%(p\w+) = scmp\.\w+\.[su]32\.totalorder %\w+, (\d+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!?%(p\w+)\) target bundleno = (\d+) ")
_DELAY = 3  # bundles that still issue after a branch
# Turns in which an outermost loop only fills and drains the pipeline of its copies, and its body is not run.
_PIPELINE = 2

Loop = tuple[int, int, int]  # first bundle, the one after the last, turns


@functools.cache
def folder() -> pathlib.Path:
  """Return the folder where libtpu writes the schedules of what this process compiles. It is removed when the process
  ends or, where that was ended in the compiler, by the next one."""
  stack = contextlib.ExitStack()
  atexit.register(stack.close)
  return stack.enter_context(files.temporary_folder("diffdis-schedules"))


def ask_for_them() -> None:
  """Ask libtpu for schedules; call it before libtpu is loaded, which reads once where to write them."""
  flags, asked = os.environ.get("LIBTPU_INIT_ARGS", ""), _FLAGS.format(folder())
  if asked not in flags:
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {asked}".strip()


def without_them(flags: str) -> str:
  """Return the flags for libtpu except those of `ask_for_them`, which differ by process."""
  return flags.replace(_FLAGS.format(folder()), "").strip()


def clear() -> None:
  """Remove the schedules of what was compiled before."""
  for path in folder().iterdir():
    path.unlink()


def cycles_by_operation(written: pathlib.Path) -> dict[str, int]:
  """Return, by an operation's name in the program's text, the cycles of one device's core, by the schedules in this
  folder."""
  files = ((_FILE.fullmatch(path.name), path) for path in written.iterdir())
  return {match[1]: cycles(path.read_text().splitlines()) for match, path in files if match}


def cycles(lines: Iterable[str]) -> int:
  """Count the cycles of one schedule: each bundle as often as the loops around it turn."""
  last, turns, backwards = 0, {}, []
  for line in lines:
    if bundle := _BUNDLE.match(line):
      last = int(bundle[1], 0)
    turns.update({predicate: int(count) for predicate, count in _EXIT.findall(line)})
    backwards += [(int(start), last, predicate) for predicate, start in _BACK.findall(line) if int(start) <= last]
  loops = [(start, end + _DELAY, turns.get(predicate, 1)) for start, end, predicate in backwards]
  return _within(0, last + 1, loops, outermost=True)


def _within(start: int, end: int, loops: list[Loop], *, outermost: bool = False) -> int:
  """Count the cycles of the bundles from start to end, in which `loops` lie."""
  total, after = end - start, start
  # The outer ones first: of those that begin together, the longest.
  for first, last, count in sorted(loops, key=lambda loop: (loop[0], -loop[1])):
    if first < after or last > end + _DELAY:
      continue
    inside = [loop for loop in loops if first <= loop[0] and loop[1] <= last and loop != (first, last, count)]
    count -= _PIPELINE if outermost and count > _PIPELINE else 0
    total += _within(first, last, inside) * count - (last - first)
    after = last
  return total
