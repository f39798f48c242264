"""Test the command ablate: it trains runs of the tiny config, which are killed, and writes their tables."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from diffdis_jax.run import provenance
from tests.command_runs import ROOT, STEPS, call, joint_flags
from tests.interrupting import Terminal

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)
BASE = "--base=tests/tiny_ablation.py"
GRID = "--grid=loss.ita_weight=0.01,0.3"


def start(environment: dict[str, str], *flags: str) -> subprocess.Popen:
  """Start ablate in its own process group, so that a kill also reaches the process of a run."""
  command = [sys.executable, "-m", "diffdis_jax.ablate", *flags]
  return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def steps_of(out: pathlib.Path) -> int:
  """Count the logged steps of all runs."""
  return sum(len(path.read_text().splitlines()) for path in out.glob("runs/*/metrics.jsonl"))


def tables_of(environment: dict[str, str], out: pathlib.Path, *flags: str) -> bytes:
  """Write the tables, and return tables.json without the minutes of each run."""
  done = call("ablate", environment, "table", BASE, *flags, f"--out={out}")
  assert done.returncode == 0, done.stderr
  assert (out / "tables.md").read_text() == done.stdout
  return re.sub(rb'"minutes": [^,\n]*', b'"minutes": 0', (out / "tables.json").read_bytes())


def test_a_killed_ablation_ends_in_the_same_table(tmp_path, environment, joint_run, autoencoder_run):
  """The joint run of the other tests is the same training without a kill, so it is only measured here."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  flags = [BASE, "--grid=loss.ita_weight=0.01", "--seeds=0", *joint_flags(autoencoder_run)[1:]]
  process, chosen = start(environment, "run", *flags, f"--out={killed}"), random.randint(1, STEPS - 1)
  while steps_of(killed) < chosen:
    assert process.poll() is None
    time.sleep(0.005)
  kill(process)
  (run,) = (path.name for path in (killed / "runs").iterdir())
  (whole / "runs").mkdir(parents=True)
  shutil.copy(killed / "base.json", whole)
  shutil.copytree(joint_run, whole / "runs" / run)
  for out in (killed, whole):
    assert not list(out.glob("results/*.json"))
    done = call("ablate", environment, "run", *flags, f"--out={out}", "--only=0")
    assert done.returncode == 0, done.stderr
  assert "resuming from step" not in done.stderr  # nothing was trained

  first, second = (tables_of(environment, out, *flags[1:]) for out in (whole, killed))
  assert first == second
  table = json.loads(first)
  cells = table["tables"]["grid"]["rows"][0]["cells"]
  assert {name: cell["n"] for name, cell in cells.items()} == {"test/acc1": 1, "test_retrieval/recall@1": 1}
  code, (arm,) = provenance.code(), table["runs"].values()
  assert table["provenance"]["commits"] == [code["commit"]] and table["provenance"]["clean"] is code["clean"]
  assert table["provenance"]["versions"] == [code["versions"]]
  assert arm["provenance"]["steps"] == STEPS and arm["provenance"]["commits"] == [code["commit"]]
  assert [origin["objectives"] for origin in arm["provenance"]["init_from"]] == [["reconstruction"]]
  assert str(tmp_path.parent) not in first.decode()  # the autoencoder's folder is in it, too
  for file in killed.glob("results/*.json"):
    assert str(tmp_path.parent) not in file.read_text()


@pytest.mark.full
@pytest.mark.parametrize("how, code", [("SIGTERM", 75), ("Ctrl-C", 130)])
def test_an_ablation_that_is_stopped_saves(tmp_path, environment, autoencoder_run, how, code):
  out = tmp_path / "out"
  flags = [BASE, GRID, "--seeds=0", "--config.log_every=1", "--config.save_every=1000", "--config.num_steps=400"]
  flags.append(f"--config.init_from={autoencoder_run}")
  command = [sys.executable, "-m", "diffdis_jax.ablate", "run", *flags, f"--out={out}", "--quiet"]
  with Terminal(command, environment, tmp_path / "stderr") as terminal:
    terminal.wait_until(lambda: steps_of(out) >= 3, seconds=300)
    terminal.ctrl_c() if how == "Ctrl-C" else terminal.process.terminate()
    assert terminal.end(seconds=120) == code
    assert terminal.stderr.count("\n") == (1 if how == "Ctrl-C" else 0), terminal.stderr
  state = call("ablate", environment, "plan", *flags, f"--out={out}").stdout.splitlines()
  assert " of 400" in state[0] and "missing" in state[1] and "? h" not in state[1]


@pytest.mark.parametrize(
  "flags, message",
  [
    ([GRID, "--config.seed=7"], "--config.seed has no effect on an ablation, .* --seeds=0,1,2; give those"),
    (
      [GRID, "--config.loss.ita_weight=0.5"],
      "--config.loss.ita_weight=0.5 has no effect on these rows, whose own values are 0.01, 0.3; leave it out",
    ),
  ],
)
def test_flags_that_contradict_each_other_are_refused_in_one_line(tmp_path, environment, flags, message):
  done = call("ablate", environment, "run", BASE, *flags, f"--out={tmp_path / 'out'}")
  assert (done.returncode, done.stdout) == (2, "")
  assert re.fullmatch(f"error: {message}\n", done.stderr)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "grid, message",
  [
    ("loss.itaweight=1", "unknown config key loss.itaweight; did you mean loss.ita_weight[?]"),
    (
      "batch_size=16,-16",
      "run batch_size_-16-seed_0-[0-9a-f]{8}: batch_size is -16; it must be at least 1 and at most .*",
    ),
    ("optim.rates.new=1e-3,-2", "run .*: optim.rates.new is -2.0; it must be at least 0"),
    ("evals.test.task=zero_shot,zeroshot", "run .*: evals.test: unknown task 'zeroshot'; did you mean zero_shot[?]"),
    ("evals.test.task=retrieval", "run .*: evals.test: evaluation retrieval has no setting 'classnames'; known: .*"),
  ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path, environment, grid, message):
  done = call("ablate", environment, "run", BASE, f"--grid={grid}", f"--out={tmp_path / 'out'}")
  assert (done.returncode, done.stdout) == (2, "")
  assert re.fullmatch(f"error: {message}\n", done.stderr)
  assert not (tmp_path / "out").exists()
