"""Checks checkpoints, prepared data and exports against the digests of their files.

  diffdis verify --workdir=RUN

Writes one line for each checkpoint, or one for a folder that prepare_data or export_weights wrote. Exits with code 2
where one is damaged, and names the newest whole one. Nothing is changed. What is in a bucket is compared by the digests
that its server keeps, and is not downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import flags
from etils import epath

from diffdis_jax.common import buckets, cli, one_file
from diffdis_jax.errors import UserError
from diffdis_jax.run import digests, workdir

FLAGS = flags.FLAGS


class Verified(NamedTuple):
  """One checkpoint, what is to be said of it, and whether a file of it is not as it was saved."""

  step: int
  state: str
  damaged: bool = False


def define_flags() -> None:
  """Define the command line."""
  flags.DEFINE_string("workdir", None, "folder of the run, of prepared data or of exported weights", required=True)


def main(argv: Sequence[str]) -> None:
  del argv
  path = buckets.path(FLAGS.workdir)
  if (path / digests.NAME).exists():
    if (damage := digests.damage(path)) is not None:
      raise UserError(f"{path} is damaged: {damage.file} {damage.what}; copy it again, or make it again")
    cli.write(f"{path}: {_size(path)}\n")
    return
  folder, damaged, count = workdir.checkpoints(path), 0, 0
  for found in verify(path):
    cli.write(f"checkpoint {found.step}: {found.state}\n")  # as soon as it is known: each may take minutes
    damaged, count = damaged + found.damaged, count + 1
  if damaged:
    whole = workdir.newest_whole(folder, workdir.run_digest(path))
    then = "none is known to be whole" if whole is None else f"the newest whole one is {whole}: take --step={whole}"
    raise UserError(f"{damaged} of {count} checkpoints in {folder} {'is' if damaged == 1 else 'are'} damaged; {then}")


def verify(run: epath.PathLike) -> Iterator[Verified]:
  """Look at each checkpoint of a run, by step.

  Raises:
    UserError: there is none, or config.json is damaged; or it is a run in one file, and damaged.
    OSError: its storage cannot be reached.
  """
  if (file := one_file.at(run)) is not None:
    one_file.read_params(file)
    yield Verified(one_file.read_record(file).step, f"whole: 1 file, {file.stat().st_size / 1e6:.1f} MB")
    return
  folder, digest = workdir.checkpoints(run), workdir.run_digest(run)
  paths = workdir.all_steps(folder)
  if not paths:
    raise UserError(f"no checkpoint in {folder}; train first, or wait for the first save{one_file.meant(run)}")
  for path in paths:
    step, mark = int(path.name), path / digests.COMMIT_MARK
    if not mark.exists():
      yield Verified(step, f"does not count: it has no {mark.name}; its save was interrupted, or is in progress")
      continue
    damage = digests.damage_of_step(path, digest)
    if not mark.exists():
      yield Verified(step, "removed meanwhile: the run keeps only some")
    elif damage is not None:
      yield Verified(step, f"damaged: {damage.file} {damage.what}", damaged=True)
    else:
      yield Verified(step, _size(path))


def _size(path: epath.Path) -> str:
  """Describe a folder without damage."""
  found = digests.read(path)
  listed = found.files.values() if isinstance(found, digests.Digests) else ()
  return f"whole: {len(listed)} files, {sum(file.size for file in listed) / 1e6:.1f} MB"


if __name__ == "__main__":
  define_flags()
  cli.run(main)
