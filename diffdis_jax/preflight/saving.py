"""What a run begins with, compiled and kept for `train --compiled`."""

from __future__ import annotations

import os
from collections.abc import Collection

import jax
from absl import logging
from jax.sharding import Mesh

from diffdis_jax.common import buckets, cli, files
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError, install
from diffdis_jax.models import attention
from diffdis_jax.parallel import chips, executables, sharding
from diffdis_jax.preflight.targets import Compiled, Target
from diffdis_jax.training.prepared import Prepared


def check_target(programs: Collection[str], platform: str, topology: chips.Topology | None) -> None:
  """Raises UserError: nothing is compiled that could be kept."""
  if platform == "cpu" and topology:
    raise UserError(
      f"--save keeps programs for the chips of {topology.name}, whose compiler is missing or not asked for;"
      f" {install('tpu' if topology.is_tpu else 'cuda')}, or leave --topology out to compile for this machine"
    )
  if "train" not in programs:
    raise UserError("--save keeps what train begins with; leave --programs out, or name train in it")


def check(folder: str) -> None:
  """Creates the folder, before half an hour of compiling. Raises UserError: it cannot be written."""
  path = buckets.path(folder)
  with files.writing(f"--save={folder}"):
    path.mkdir(parents=True, exist_ok=True)
  files.check_out(os.fspath(path / "training_step"), "save")


def save_here(run: Run, folder: str) -> None:
  """Compiles for the devices of this machine. Raises UserError: they cannot train it, or it cannot be kept."""
  cli.compilation_cache()
  cli.use_all_cores()
  jax.config.update("jax_numpy_dtype_promotion", "strict")  # as train has it, which is part of a program's key
  mesh = sharding.make_mesh(**vars(run.mesh))
  logging.info("compiling for %d x %s", mesh.size, mesh.devices.flat[0].device_kind)
  Prepared.of(run, mesh, executables.Folder(buckets.path(folder), given=True)).save()


def save(run: Run, mesh: Mesh, target: Target, compiled: Compiled, folder: str) -> None:
  """Keeps a train step that fits, and compiles what comes before it. Raises UserError: it cannot be kept."""
  if not compiled.fits:
    logging.warning("it does not fit, and is not kept in %s", folder)
    return
  with attention.standing_in_for(target.chip.platform):
    Prepared.of(run, mesh, executables.Folder(buckets.path(folder), given=True)).save(compiled.fresh)
