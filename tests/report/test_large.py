"""How long a report of a long run takes, and how large it is."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.evals import samples
from tests.command_runs import ROOT
from tests.report import written_run

LINES, GRIDS = 100_000, 200
QUARTERS = tuple(f"loss_{part}_q{i}" for part in ("generation", "discrimination") for i in (1, 2, 3, 4))
NAMES = ("loss", "loss_generation", "loss_discrimination", *QUARTERS, "alignment_accuracy", "temperature", "grad_norm")
NAMES += ("steps_per_sec", "images_per_sec", "data_wait", "substituted")


@pytest.mark.full
def test_a_hundred_thousand_lines_and_two_hundred_grids_are_ten_seconds_and_ten_megabytes(tmp_path):
  run, out = written_run.write(tmp_path / "run", num_steps=10 * LINES), tmp_path / "report.html"
  rng = np.random.default_rng(0)
  with open(f"{run}/metrics.jsonl", "w") as file:
    for i, values in enumerate(rng.uniform(0.5, 1.5, (LINES, len(NAMES))), 1):
      file.write(json.dumps({"step": 10 * i, **dict(zip(NAMES, values.tolist()))}) + "\n")
  # 64 samples of 32 px each, as configs/shapes.py draws them: smooth, and no two alike.
  for i in range(GRIDS):
    tiles = [Image.fromarray(tile).resize((32, 32)) for tile in rng.integers(0, 256, (64, 6, 6, 3), dtype=np.uint8)]
    grid = samples.draw_grid(np.stack([np.asarray(tile) for tile in tiles]), ["a red star"] * 64, columns=8)
    grid.save(f"{run}/samples/samples_{5000 * (i + 1):08d}.png")

  begin = time.monotonic()
  command = [sys.executable, "-m", "diffdis_jax.report", f"--workdir={run}", f"--out={out}"]
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  seconds = time.monotonic() - begin
  sys.stdout.write(f"{seconds:.1f} s, {out.stat().st_size / 1e6:.2f} MB\n")
  assert out.stat().st_size <= 10e6 and seconds <= 10
  assert out.read_text().count("data:image/webp") >= GRIDS
