"""Lists the commands, or runs one: diffdis [COMMAND --flag=value ...], which is python -m diffdis_jax as well."""

from __future__ import annotations

import pathlib
import re
import runpy
import sys
from collections.abc import Sequence
from typing import NoReturn

import diffdis_jax
from diffdis_jax.common.guesses import did_you_mean

USAGE = """DiffDis in JAX: one diffusion model that generates images from text and classifies images.

  diffdis COMMAND --flag=value ...     (or: python -m diffdis_jax.COMMAND ...)

{commands}

  diffdis COMMAND --help     an example, and the command's flags
  diffdis --version          the version
"""


def commands() -> dict[str, str]:
  """Say what each command does, by its name: the beginning of its file's docstring. Nothing is imported."""
  described, package = {}, pathlib.Path(__file__).parent
  for path in [*package.glob("*.py"), *package.glob("*/__main__.py")]:
    # Read as text: to import all commands would take many seconds, and the packages of every extra.
    text = path.read_text(encoding="utf-8")
    if "\n  cli.run(main" in text:
      name = path.parent.name if path.stem == "__main__" else path.stem
      described[name] = re.split(r"[.:;]\s", text.removeprefix('"""'))[0]
  return dict(sorted(described.items()))


def main(argv: Sequence[str]) -> int:
  """Return the exit code, unless a command of that name takes over."""
  described, command = commands(), argv[0] if argv else "--help"
  if command == "--version":
    sys.stdout.write(f"diffdis_jax {diffdis_jax.__version__}\n")
  elif command in ("-h", "--help", "help"):
    lines = "\n".join(f"  {name:{max(map(len, described))}}  {what}" for name, what in described.items())
    sys.stdout.write(USAGE.format(commands=lines))
  elif command in described:  # since runpy would run any module of the package
    sys.argv = [f"diffdis_jax.{command}", *argv[1:]]
    # As if by python -m: --help and the flags belong to the file that runs as __main__.
    runpy.run_module(f"diffdis_jax.{command}", run_name="__main__", alter_sys=True)
  else:
    sys.stderr.write(f"error: no command {command!r}; {did_you_mean(command, described)}\n")
    return 2
  return 0


def run() -> NoReturn:
  """Run the command `diffdis` of an installed package."""
  sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
  run()
