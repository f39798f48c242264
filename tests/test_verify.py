"""diffdis verify, as a user types it."""

from __future__ import annotations

import json
import os
import random
import shutil

from diffdis_jax.data import records, sources
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.run import digests, workdir
from tests.command_runs import call
from tests.raw_pairs import picture, write_tar
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
    "checkpoint 1: damaged: digests.json is missing",
    "checkpoint 2: damaged: meta/metadata is missing",
  ]
  assert lines[2].startswith("checkpoint 3: whole: ")
  assert lines[3].startswith("checkpoint 4: does not count: it has no commit_success.txt; ")
  name = damaged.relative_to(folder / "5").as_posix()
  assert lines[4:] == [f"checkpoint 5: damaged: {name} holds other bytes than were saved"]
  assert code == 2 and errors == [
    f"error: 3 of 5 checkpoints in {folder} are damaged; the newest whole one is 3: take --step=3"
  ]
  assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_renamed_checkpoint_one_of_another_run_and_a_damaged_config(tmp_path):
  config = {"seed": 0, "num_steps": 8, "log_every": 1}
  for name, seed in (("a", 0), ("b", 1)):
    workdir.open_for_training(tmp_path / name, config | {"seed": seed})
    save(tmp_path / name, 4 + seed)
  folder = tmp_path / "a" / "checkpoints"
  shutil.copytree(folder / "4", folder / "6")
  shutil.copytree(tmp_path / "b" / "checkpoints" / "5", folder / "5")
  code, lines, errors = verify(tmp_path / "a")
  assert (
    code == 2
    and lines[0].startswith("checkpoint 4: whole: ")
    and lines[1:]
    == [
      "checkpoint 5: damaged: digests.json says that it was saved by a run of another config than config.json has",
      "checkpoint 6: damaged: digests.json says that it was saved as step 4",
    ]
  )
  assert errors == [f"error: 2 of 3 checkpoints in {folder} are damaged; the newest whole one is 4: take --step=4"]
  file = tmp_path / "a" / "config.json"
  file.write_text(file.read_text().replace('"log_every": 1', '"log_every": 3'))  # which does not change the training
  code, lines, errors = verify(tmp_path / "a")
  assert (code, lines) == (2, [])
  assert errors[0].startswith(f"error: {file} is not as it was written: it is damaged, or was edited; ")


def test_prepared_data_are_a_line(tmp_path):
  raw = tmp_path / "raw"
  raw.mkdir()
  write_tar(raw / "0.tar", {f"{i}.{end}": x for i in range(8) for end, x in (("png", picture(i)), ("txt", b"x"))})
  done = call("prepare_data", ENVIRONMENT, "pairs", f"--source={raw}", f"--out={tmp_path / 'out'}", "--num_processes=1")
  assert done.returncode == 0, done.stderr
  out = tmp_path / "out"
  names = {file.name for file in out.iterdir()} - {digests.NAME}
  assert {*json.loads((out / digests.NAME).read_text())["files"]} == names
  code, lines, errors = verify(out)
  assert (code, errors) == (0, []) and lines[0].startswith(f"{out}: whole: {len(names)} files, ")
  random_ = random.Random(0)
  for name in sorted(names):
    before = (out / name).read_bytes()
    flip(out / name, random_)
    assert digests.damage(out) == digests.Damage(name, "holds other bytes than were saved")
    (out / name).write_bytes(before)
  flip(out / "dataset_info.json", random_)
  code, lines, errors = verify(out)
  assert (code, lines) == (2, [])
  said = (
    f"error: {out} is damaged: dataset_info.json holds other bytes than were saved; copy it again, or make it again"
  )
  assert errors == [said]


def test_no_flipped_bit_of_a_shard_is_read_in_silence(tmp_path):
  """ArrayRecord keeps hashes of its own, by which a record is refused when it is read."""
  (tmp_path / "raw").mkdir()
  content = {f"{i:02d}.{end}": x for i in range(20) for end, x in (("png", picture(i)), ("txt", b"x"))}
  write_tar(tmp_path / "raw" / "0.tar", content)
  prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  (file,) = (tmp_path / "out").glob("*.array_record*")
  read = lambda: sources.open_source(name="pairs", path=tmp_path / "out", image_size=8)
  whole, content = [read()[i] for i in range(20)], file.read_bytes()
  used = [i for i, byte in enumerate(content) if byte]  # blocks are padded with zeros, which nobody reads
  random_, refused = random.Random(0), 0
  for _ in range(60):
    flipped = bytearray(content)
    flipped[random_.choice(used)] ^= 1 << random_.randrange(8)
    file.write_bytes(flipped)
    try:
      source = read()
    except Exception:  # of an index that cannot be read
      refused += 1
      continue
    assert len(source) == 20
    for i in range(20):
      try:
        assert source[i] == whole[i]
      except records.Unusable:
        refused += 1
  assert refused > 20


def test_without_a_checkpoint(tmp_path):
  code, lines, errors = verify(tmp_path)
  assert (code, lines) == (2, [])
  assert errors == [f"error: no checkpoint in {tmp_path}/checkpoints; train first, or wait for the first save"]


def test_a_run_in_one_file_is_read_whole():
  code, (line,), _ = verify("shapes")
  assert code == 0 and "whole: 1 file" in line
