"""Write a workdir by hand, in which every number is known."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from tests import tiny

DAY = 1_790_000_000.0  # a time in seconds since 1970


def write(folder: pathlib.Path, **changes: Any) -> str:
  """Write a run that was killed at step 50 after 100 s on two devices, then stopped after 200 s.

  The last line of its metrics.jsonl is cut off.

  Args:
    changes: fields of the config, by dotted path.
  """
  folder.mkdir(parents=True)
  data = folder.parent / "birds"
  config = tiny.get_config()
  config.update_from_flattened_dict({"num_steps": 400, "data.name": "pairs", "data.path": str(data), **changes})
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  (folder / "metrics.jsonl").write_text("".join(map(line, range(10, 310, 10))) + '{"step": 310, "lo')
  start = {"event": "start", "devices": 2, "device_kind": "TPU v4", "processes": 1, "host": "a", "jax": "0.10.2"}
  start |= {
    "parameters": {"frozen": {"autoencoder": 30}, "new": {"unet": 60, "alignment": 10}},
    "data": ["birds </script><b>"],
  }
  events = [
    start | {"time": DAY, "step": 0},
    start | {"time": DAY + 500, "step": 40, "reached": 50, "until": DAY + 100},
    {"event": "end", "time": DAY + 700, "why": "stopped"},
  ]
  (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
  os.utime(folder / "history.jsonl", (DAY + 700, DAY + 700))
  (folder / "samples").mkdir()
  for step in (100, 200, 300):
    picture(step).save(folder / "samples" / f"samples_{step:08d}.png")
  for step, committed in ((200, True), (300, True), (400, False)):
    saved = folder / "checkpoints" / str(step)
    saved.mkdir(parents=True)
    if committed:
      (saved / "commit_success.txt").touch()
  (folder / "checkpoints" / "200" / "metrics").mkdir()
  (folder / "checkpoints" / "200" / "metrics" / "metrics").write_text('{"test/acc1": 0.25}')
  record = {"dataset": "birds/val", "metrics": {"acc1": 0.75}, "protocol": {"seed": 0}}
  (folder / "results.json").write_text(json.dumps({"zero_shot": {"birds/val": record}}))
  return str(folder)


def line(step: int) -> str:
  """Return a line of metrics.jsonl: a loss of 100 / step, and 5 steps a second, unknown at step 10."""
  values = {"step": step, "loss": 100 / step, "grad_norm": 1.0 if step != 150 else 77.0, "substituted": int(step == 60)}
  values |= {"steps_per_sec": None if step == 10 else 5.0, "images_per_sec": 80.0, "data_wait": 0.125}
  text = json.dumps(values) + "\n"
  return text + json.dumps({"step": step, "test/acc1": step / 1000}) + "\n" if step % 100 == 0 else text


def picture(seed: int) -> Image.Image:
  values = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
  return Image.fromarray(values).resize((160, 80))
