"""Test the command diffdis verify."""

from __future__ import annotations

import json
import os
import random

from diffdis_jax.run import digests
from tests.command_runs import call
from tests.raw_pairs import picture, write_tar
from tests.run.test_checkpoint import save
from tests.run.test_digests import checkpoint_files, flip, large_state

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def verify(workdir):
  done = call("verify", ENVIRONMENT, f"--workdir={workdir}")
  return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_every_checkpoint_is_reported_in_a_line(tmp_path):
  save(tmp_path, 1, 2, 3, 4, 5, state=large_state(), keep_last=9)
  code, lines, errors = verify(tmp_path)
  assert (code, errors) == (0, []) and lines == [f"checkpoint {step}: whole" for step in range(1, 6)]

  folder = tmp_path / "checkpoints"
  (folder / "1" / digests.NAME).unlink()
  (folder / "2" / "meta" / "metadata").unlink()
  (folder / "4" / "commit_success.txt").unlink()
  damaged = max(checkpoint_files(tmp_path, 5), key=lambda path: path.stat().st_size)
  flip(damaged, random.Random(0))
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  code, lines, errors = verify(tmp_path)
  assert lines[:2] == [
    "checkpoint 1: damaged: digests.json is missing",
    "checkpoint 2: damaged: meta/metadata is missing",
  ]
  assert lines[2] == "checkpoint 3: whole"
  assert lines[3].startswith("checkpoint 4: does not count: it has no commit_success.txt; ")
  name = damaged.relative_to(folder / "5").as_posix()
  assert lines[4:] == [f"checkpoint 5: damaged: {name} holds other bytes than were saved"]
  assert code == 2 and errors == [
    f"error: 3 of 5 checkpoints in {folder} are damaged; the newest whole one is 3: take --step=3"
  ]
  assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepared_data_are_reported_in_a_line(tmp_path):
  raw = tmp_path / "raw"
  raw.mkdir()
  write_tar(raw / "0.tar", {f"{i}.{end}": x for i in range(8) for end, x in (("png", picture(i)), ("txt", b"x"))})
  done = call("prepare_data", ENVIRONMENT, "pairs", f"--source={raw}", f"--out={tmp_path / 'out'}", "--num_processes=1")
  assert done.returncode == 0, done.stderr
  out = tmp_path / "out"
  names = {file.name for file in out.iterdir()} - {digests.NAME}
  assert {*json.loads((out / digests.NAME).read_text())["files"]} == names
  code, lines, errors = verify(out)
  assert (code, lines, errors) == (0, [f"{out}: whole"], [])
  flip(out / "dataset_info.json", random.Random(0))
  code, lines, errors = verify(out)
  assert (code, lines, len(errors)) == (2, [], 1)
  assert errors[0].startswith(f"error: {out} is damaged: dataset_info.json holds other bytes than were saved; ")


def test_a_run_in_one_file_is_reported_in_a_line():
  code, (line,), _ = verify("shapes")
  assert code == 0 and line.endswith(": whole")
