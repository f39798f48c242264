"""How many of our functions stand between the command and Algorithm 1: what a reader of the step goes through."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.command_runs import ROOT

_STACK = """
import json, pathlib, sys, traceback
from absl import app
from diffdis_jax.common import cli
from diffdis_jax.method import algorithms
from diffdis_jax import train

def training_losses(*_, **__):
  stack = [frame for frame in traceback.extract_stack()[:-1] if "/diffdis_jax/" in frame.filename]
  names = [(pathlib.Path(frame.filename).stem, frame.name) for frame in stack]
  print(json.dumps(names[names.index(("train", "main")):]))
  raise SystemExit

algorithms.training_losses = training_losses
train.define_flags()
cli.run(train.main)
"""


@pytest.mark.slow
def test_few_frames_stand_between_the_command_and_algorithm_1(tmp_path):
  allowed = "--config.optim.allow_uninitialized=."
  command = [sys.executable, "-c", _STACK, "--config=tests/tiny.py", f"--workdir={tmp_path}/run", allowed]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  names = [tuple(name) for name in json.loads(done.stdout.splitlines()[-1])]
  print(names)
  names.append(("algorithms", "training_losses"))
  assert len(names) <= 8 and len({file for file, _ in names}) <= 6, names
  assert names[1] == ("loop", "train_and_evaluate") and names[-2] == ("losses", "diffusion_loss")
