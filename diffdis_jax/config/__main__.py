"""Prints a config, field by field: value, range and meaning; or what two configs differ in.

  diffdis config show shapes [--fields=optim]
  diffdis config diff shapes shapes:objectives=contrastive

A config is NAME[:args] of one that comes with the package, FILE.py[:args], or the workdir of a run, which may be one
file. Nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from diffdis_jax.common import buckets, cli, guesses, one_file, shipped, usage
from diffdis_jax.config import Run, described, fields
from diffdis_jax.errors import UserError

FLAGS = flags.FLAGS
NUMBERS = {"show": 1, "diff": 2}  # of configs that a verb takes


def define_flags() -> None:
  """The command line."""
  flags.DEFINE_string("fields", "", "of show: only fields whose dotted path begins so, such as optim or model.unet")


def main(argv: Sequence[str]) -> None:
  verb, configs = next(iter(argv[1:]), ""), argv[2:]
  if NUMBERS.get(verb) != len(configs):
    raise UserError(
      f"config {' '.join(argv[1:])}: write config show CONFIG [--fields=PREFIX], or config diff CONFIG CONFIG"
    )
  runs = [read(each) for each in configs]
  lines = list(show(*runs, prefix=FLAGS.fields) if verb == "show" else differences(*runs))  # all of them, or none
  usage.write("".join(f"{line}\n" for line in lines))


def read(given: str) -> Run:
  """The record of a config, or of a run. Raises UserError: none, or one that is wrong."""
  name = given.partition(":")[0]
  # A name first, as everywhere: where a run is called `shapes` too, it is written ./shapes.
  is_config = name in shipped.names() or name.endswith(".py")
  if not is_config and (buckets.is_url(given) or one_file.at(given) or buckets.path(given).is_dir()):
    return fields.load(given)
  return Run.of(cli.read_config(given, "config"))


def show(run: Run, *, prefix: str = "") -> Iterator[str]:
  """Path, value and range of each field, and in the line below what it means."""
  found = described.fields_of(run)
  chosen = [field for field in found if f"{field.path}.".startswith(f"{prefix}.") or not prefix]
  if not chosen:
    sections = {".".join(field.path.split(".")[:n]) for field in found for n in (1, 2, 3)}
    raise UserError(f"--fields={prefix} is the beginning of no field; {guesses.did_you_mean(prefix, sections)}")
  for field in chosen:
    yield f"{field.path} = {field.value!r}" + (f"    ({field.range})" if field.range else "")
    if field.meaning:
      yield f"    {field.meaning}"


def differences(one: Run, other: Run) -> Iterator[str]:
  """A line for each field that differs, or that one of them lacks."""
  # A config file may have lists, of which a run's config.json makes tuples.
  left, right = (guesses.fields_of(fields.normalise(run.to_dict())) for run in (one, other))
  paths = [path for path in [*left, *(path for path in right if path not in left)] if _differ(left, right, path)]
  for path in paths:
    yield f"{path}: {_said(left, path)} -> {_said(right, path)}"
  if not paths:
    yield "no field differs"


def _differ(left: Mapping[str, Any], right: Mapping[str, Any], path: str) -> bool:
  return (path in left) != (path in right) or left[path] != right[path]


def _said(found: Mapping[str, Any], path: str) -> str:
  return repr(found[path]) if path in found else "not there"


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=3)
