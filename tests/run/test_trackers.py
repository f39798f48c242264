"""Test Weights & Biases without its server. The longest tests need the extra wandb."""

from __future__ import annotations

import json
import os
import pathlib
import struct
import subprocess
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.run import writers

LOG_BLOCK = 32768  # bytes
# A new run, and a resumed one, each in a process of its own as after a kill.
RUN = """
import sys
import numpy as np

folder, start = sys.argv[1], int(sys.argv[2])
track = lambda: writers.Tracker(folder, {"seed": 3, "optim": {"rate": 0.5}})
writer = writers.open_writer(folder, start_step=start, is_writer=True, open_tracker=track)
for step in (start + 1, start + 2):
  writer.scalars(step, {"loss": 1.0 / step, "coco/recall@1": 0.25, "bad": float("nan")})
writer.image(start + 2, "samples", np.full((4, 6, 3), 200, np.uint8))
writer.close()
"""


def run(folder: pathlib.Path, start: int, **environment: str) -> None:
  kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
  command = [sys.executable, "-c", RUN, str(folder), str(start)]
  done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr


def log_records(data: bytes) -> Iterator[bytes]:
  """What an offline run of wandb keeps: 7 bytes of its own, then LevelDB's log, blocks of pieces of records, each piece
  with a checksum, its length, and whether it is all of a record, or its first, a middle or its last piece."""
  place, record = 7, b""
  while place < len(data):
    if (left := LOG_BLOCK - place % LOG_BLOCK) < 7:
      place += left
      continue
    length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
    record += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
      yield record
      record = b""


@pytest.mark.full
def test_wandb_offline_has_the_same_numbers_and_goes_on_with_the_same_run(tmp_path):
  from wandb.proto import wandb_internal_pb2

  folder = tmp_path / "run"
  for start in (0, 1):
    run(folder, start, WANDB_MODE="offline", WANDB_SILENT="true")
  files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
  (id,) = json.loads((folder / "trackers.json").read_text()).values()
  assert len(files) == 2 and {path.name for path in files} == {f"run-{id}.wandb"}
  history = []
  for file in files:
    for data in log_records(file.read_bytes()):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      if record.HasField("history"):
        history.append({".".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item})
  scalars = [(line["step"], line["loss"], line["coco/recall@1"]) for line in history if "loss" in line]
  assert scalars == [(1, 1.0, 0.25), (2, 0.5, 0.25), (2, 0.5, 0.25), (3, 1 / 3, 0.25)]
  assert not any("bad" in line for line in history)
  pictures = [(line["step"], line) for line in history if "loss" not in line]
  assert [step for step, _ in pictures] == [2, 3]
  assert len(list((folder / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))) == 2


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
  writers.check_tracker("")
  monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    UserError, match=r"--tracker=wandb needs the package wandb, which is not installed; pip install -e '\.\[wandb\]'"
  ):
    writers.check_tracker("wandb")


class SignedOut(types.SimpleNamespace):
  """wandb where nobody has signed in."""

  class Error(Exception):
    pass

  def login(self, *, verify: bool):
    assert not verify
    raise self.Error("No API key configured. Use `wandb login` to log in.")


def test_without_an_account_a_run_does_not_begin(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", SignedOut())
  monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: object())
  monkeypatch.delenv("WANDB_MODE", raising=False)
  with pytest.raises(UserError, match="--tracker=wandb: No API key .* With WANDB_MODE=offline the numbers stay here"):
    writers.check_tracker("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  for kind in ("wandb", ""):
    writers.check_tracker(kind)


@pytest.mark.full
def test_wandb_says_that_nobody_has_signed_in(tmp_path, monkeypatch):
  for name in ("WANDB_MODE", "WANDB_API_KEY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(UserError, match="--tracker=wandb: No API key"):
    writers.check_tracker("wandb")


def test_only_the_writer_opens_a_tracker(tmp_path):
  def refuse():
    raise AssertionError("opened")

  writer = writers.open_writer(tmp_path, start_step=0, is_writer=False, open_tracker=refuse)
  writer.scalars(1, {"loss": 1.0})
  writer.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
  writer.close()
