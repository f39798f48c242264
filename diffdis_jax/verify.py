"""Checks checkpoints, prepared data and exports against the digests of their files.

  diffdis verify --workdir=RUN

Writes a line for each checkpoint, or for a folder that prepare_data or export_weights wrote. Exits with code 2 where
one is damaged, and names the newest whole one. Files in a bucket are compared by their server's digests, and are not
downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from etils import epath

from diffdis_jax.common import buckets, cli, one_file
from diffdis_jax.errors import UserError
from diffdis_jax.run import digests, workdir

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run, of prepared data or of exported weights", required=True)


def main(argv: Sequence[str]) -> None:
  path = buckets.path(FLAGS.workdir)
  if (path / digests.NAME).exists():
    if (damage := digests.damage(path)) is not None:
      raise UserError(f"{path} is damaged: {damage.file} {damage.what}; copy it again, or make it again")
    cli.write(f"{path}: whole\n")
  elif (file := one_file.at(path)) is not None:
    one_file.read_params(file)  # which checks it
    cli.write(f"checkpoint {one_file.read_record(file).step}: whole\n")
  else:
    verify(path)


def verify(run: epath.Path) -> None:
  """Write a line for each checkpoint of a run. Raises UserError: there is none, one is damaged, or config.json is."""
  folder, digest = workdir.checkpoints(run), workdir.run_digest(run)
  paths, damaged = workdir.all_steps(folder), 0
  if not paths:
    raise UserError(f"no checkpoint in {folder}; train first, or wait for the first save{one_file.meant(run)}")
  for path in paths:
    mark = path / digests.COMMIT_MARK
    if not mark.exists():
      state = f"does not count: it has no {mark.name}; its save was interrupted, or is in progress"
    elif (damage := digests.damage_of_step(path, digest)) is None:
      state = "whole"
    elif not mark.exists():
      state = "removed meanwhile: the run keeps only some"
    else:
      state, damaged = f"damaged: {damage.file} {damage.what}", damaged + 1
    cli.write(f"checkpoint {path.name}: {state}\n")  # as soon as it is known: each may take minutes
  if damaged:
    whole = workdir.newest_whole(folder, digest)
    then = "none is known to be whole" if whole is None else f"the newest whole one is {whole}: take --step={whole}"
    raise UserError(f"{damaged} of {len(paths)} checkpoints in {folder} are damaged; {then}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
