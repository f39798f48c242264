"""diffdis verify, as a user types it."""

from __future__ import annotations

import os
import random

from diffdis_jax.run import digests
from tests.command_runs import call
from tests.run.test_checkpoint import save
from tests.run.test_digests import checkpoint_files, flip, large_state

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def verify(workdir):
  done = call("verify", ENVIRONMENT, f"--workdir={workdir}")
  return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_every_checkpoint_is_a_line(tmp_path):
  save(tmp_path, 1, 2, 3, 4, 5, state=large_state(), keep_last=9)
  code, lines, errors = verify(tmp_path)
  count = len(checkpoint_files(tmp_path, 1)) - 3  # without the digests, and the two files that are written later
  assert (code, errors) == (0, []) and len(lines) == 5
  assert lines[0].startswith(f"checkpoint 1: whole: {count} files, 0.")

  folder = tmp_path / "checkpoints"
  (folder / "1" / digests.NAME).unlink()
  (folder / "2" / "meta" / "metadata").unlink()
  (folder / "4" / "commit_success.txt").unlink()
  damaged = max(checkpoint_files(tmp_path, 5), key=lambda path: path.stat().st_size)
  flip(damaged, random.Random(0))
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  code, lines, errors = verify(tmp_path)
  assert lines[:2] == [
    "checkpoint 1: not checked: it has no digests.json, as those of earlier versions",
    "checkpoint 2: damaged: meta/metadata is missing",
  ]
  assert lines[2].startswith("checkpoint 3: whole: ")
  assert lines[3].startswith("checkpoint 4: does not count: it has no commit_success.txt; ")
  name = damaged.relative_to(folder / "5").as_posix()
  assert lines[4:] == [f"checkpoint 5: damaged: {name} holds other bytes than were saved"]
  assert code == 2 and errors == [
    f"error: 2 of 5 checkpoints in {folder} are damaged; the newest whole one is 3: take --step=3"
  ]
  assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_checkpoint(tmp_path):
  code, lines, errors = verify(tmp_path)
  assert (code, lines) == (2, [])
  assert errors == [f"error: no checkpoint in {tmp_path}/checkpoints; train first, or wait for the first save"]
