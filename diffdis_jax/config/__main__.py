"""Print a config, field by field, with value, range and meaning.

  diffdis config show shapes [--fields=optim]

A config is NAME[:args] of one that comes with the package, FILE.py[:args], or the workdir of a run, which may be one
file. Nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from absl import flags

from diffdis_jax.common import buckets, cli, guesses, one_file
from diffdis_jax.config import Run, load, section
from diffdis_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("fields", "", "only fields whose dotted path begins so, such as optim or model.unet")


def main(argv: Sequence[str]) -> None:
  if len(argv) != 3 or argv[1] != "show":
    raise UserError(f"config {' '.join(argv[1:])}: write config show CONFIG [--fields=PREFIX]")
  cli.write("".join(f"{line}\n" for line in show(read(argv[2]), prefix=FLAGS.fields)))


def read(given: str) -> Run:
  """Return the record of a config, or of a run. Raise UserError: there is none, or it is wrong."""
  name = given.partition(":")[0]
  # A name comes first, as everywhere: a run that is also called `shapes` is written ./shapes.
  is_config = name in cli.config_names() or name.endswith(".py")
  if not is_config and (buckets.is_url(given) or one_file.at(given) or buckets.path(given).is_dir()):
    return load(given)
  return Run.of(cli.read_config(given, "config"))


def show(run: Run, *, prefix: str = "") -> Iterator[str]:
  """Yield path, value and range of each field, and its meaning on the next line."""
  lines = list(section.describe(run))
  chosen = [line for line in lines if f"{line.path}.".startswith(f"{prefix}.") or not prefix]
  if not chosen:
    sections = {".".join(line.path.split(".")[:n]) for line in lines for n in (1, 2, 3)}
    raise UserError(f"--fields={prefix} is the beginning of no field; {guesses.did_you_mean(prefix, sections)}")
  for line in chosen:
    yield f"{line.path} = {line.value!r}" + (f"    ({line.range})" if line.range else "")
    if line.meaning:
      yield f"    {line.meaning}"


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=2)
