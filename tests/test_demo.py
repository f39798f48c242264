"""Run the demo with the tiny config in the place of its config."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

import diffdis_jax
from diffdis_jax.report import read
from tests.command_runs import ROOT

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)

_WITH_THE_TINY_CONFIG = """
import functools, runpy
from diffdis_jax.common import cli
from tests import tiny

def get_config(arg=""):
  config = tiny.get_config(arg)
  if not arg:
    from diffdis_jax.evals import generation_accuracy

    train = generation_accuracy.train_on_shapes
    generation_accuracy.train_on_shapes = functools.partial(train, num_images=64)  # it trains for one step
    config.evals.generated.update(per_class=1, required_accuracy=0.0, classifier_steps=1)
    config.train_evals = ("test",)
  return config

cli.read_config = lambda path: get_config(path.partition(":")[2])
runpy.run_module("diffdis_jax.demo", run_name="__main__", alter_sys=True)
"""


def test_the_demo_compiles_ahead_and_resumes(environment, tmp_path):
  out = tmp_path / "100 %"

  def demo() -> str:
    command = [sys.executable, "-c", _WITH_THE_TINY_CONFIG, f"--out={out}"]
    two = {**environment, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, cwd=ROOT, env=two, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr

  log = demo()
  assert log.index("compiling DiffDis while its autoencoder trains") < log.index("objectives reconstruction")
  # Both runs compile each program once: the second run uses the programs that were compiled ahead.
  for program in ("the training step", "the initialisation", "the state"):
    assert log.count(f"compiled {program}") + log.count(f"loaded {program}") == 2
  assert "mesh {'data': 1," in log and "mesh {'data': 2," in log

  results = json.loads((out / "results.json").read_text())
  shares = {"zero_shot_top1", "zero_shot_unseen_top1", "generation_agreement", "generation_agreement_unseen"}
  assert results.keys() == shares | {"classifier_accuracy", "seconds", "provenance"}
  assert all(0 <= results[name] <= 1 for name in shares)
  provenance = results["provenance"]
  assert (
    provenance["device"] == {"kind": "cpu", "count": 2}
    and provenance["versions"]["diffdis_jax"] == diffdis_jax.__version__
  )
  runs = [provenance["run"], *provenance["run"]["init_from"]]
  assert [origin["objectives"] for origin in runs] == [["generation", "discrimination"], ["reconstruction"]]
  assert [origin["steps"] for origin in runs] == [8, 8] and "/" not in json.dumps(provenance)
  with Image.open(out / "grid.png") as grid:
    assert grid.width > 8 * 16 and grid.height > 8 * 16
  last_lines = [line.split("] ", 1)[1] for line in log.splitlines()[-3:]]
  assert last_lines[0] == f"finished: images in {out}/grid.png, results in {out}/results.json"
  assert last_lines[1].startswith(f"to generate more: diffdis generate --workdir='{out}/diffdis' --prompt=")
  assert last_lines[2] == f"to see all of it: diffdis report --workdir='{out}/diffdis' --out=report.html"

  # The report of the run reads these files.
  report = read.read(str(out / "diffdis"), "diffdis")
  ((step, picture),) = report.grids["grid"]
  assert step == 8 and picture.read_bytes() == (out / "grid.png").read_bytes()
  assert {result.task for result in report.results if result.file == "evaluation.json"} == {
    "zero_shot",
    "generation_accuracy",
  }

  # A second call evaluates the trained run again. The results are the same, without the seconds of the whole.
  log = demo()
  assert "compiling the training step" not in log and "compiled the initialisation" not in log
  assert json.loads((out / "results.json").read_text()) == {
    name: results[name] for name in results if name != "seconds"
  }
