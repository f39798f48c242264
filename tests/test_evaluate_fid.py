"""FID through a real network and a real Inception, with random weights; and what a killed command leaves."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffdis_jax.config import Run, read_fields
from diffdis_jax.data import shapes
from diffdis_jax.evals import distances, resize
from diffdis_jax.evals import registry as evals
from diffdis_jax.inference import Inference
from diffdis_jax.parallel import sharding
from diffdis_jax.run import restore
from tests.command_runs import ROOT, call
from tests.steps import config_of, network_of

pytest_plugins = ("tests.untrained", "tests.inception_weights", "tests.command_runs")
KILLS = int(os.environ.get("DIFFDIS_KILLS", "5"))


def section(images: int) -> dict:
  return {"task": "fid", "data": {"name": "shapes", "split": "test", "image_size": 32, "num_images": images}}


def theirs(file: pathlib.Path, images: np.ndarray) -> np.ndarray:
  network = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(file)).eval()
  with torch.no_grad():
    return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_its_features_are_torch_fidelitys_of_the_kept_images(run, inception_file, tmp_path, monkeypatch):
  # The distance itself takes seconds at this width, and has its own tests.
  monkeypatch.setattr(distances, "frechet", lambda a, b: float(np.square(a.mean - b.mean).sum()))
  config = config_of(run)
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  inference = Inference(network_of(config), Run.of(config).inference, mesh=mesh, batch_size=3)
  params = restore.restore_params(run, abstract=inference.abstract_params())
  made = evals.create(**section(6), inception=str(inception_file), parts=str(tmp_path), keep_images=True)
  metrics = made.run(inference, params)
  files = sorted((tmp_path / "images").iterdir())
  drawn = theirs(inception_file, np.stack([np.asarray(Image.open(file)) for file in files]))
  assert len(files) == 6
  assert_close(np.concatenate(features(tmp_path)), drawn)
  source = shapes.Shapes(split="test", image_size=32, num_images=6)
  squares = [resize.square(Image.fromarray(source[i]["image"]), 32, "lanczos") for i in range(6)]
  real = theirs(inception_file, np.stack(squares))
  assert_close(made._reference.features, real)
  assert metrics["num_images"] == 6
  assert metrics["fid"] == pytest.approx(np.square(drawn.mean(0) - real.mean(0)).sum(), rel=1e-3)
  assert metrics["kid"] == pytest.approx(distances.kernel(drawn, real).mean, rel=1e-3)
  protocol = made.protocol(inference)
  assert protocol["dtype"] == config.model.dtype and protocol["reference"]["num_images"] == 6


# The command, with parts of so few images that a test can wait for them.
DRIVER = """
from diffdis_jax.evals import drawn_prompts
drawn_prompts.PART = 4
from diffdis_jax import evaluate
from diffdis_jax.common import cli
evaluate.define_flags()
cli.run(evaluate.main)
"""


@pytest.fixture(scope="module")
def fid_run(run, inception_file, tmp_path_factory) -> pathlib.Path:
  """The untrained run, whose config measures FID."""
  folder = tmp_path_factory.mktemp("fid") / "run"
  shutil.copytree(run, folder)
  config = read_fields(folder)
  config["evals"] = {"few": {**section(40), "inception": str(inception_file)}}
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def command(run: pathlib.Path, out: pathlib.Path, *flags: str) -> list[str]:
  return [sys.executable, "-c", DRIVER, f"--workdir={run}", f"--out={out}", "--batch_size=4", *flags]


def start(processes: int, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
  if processes > 1:
    command = ["launch/local.sh", "-n", str(processes), "-d", "1", "--max-restarts", "0", "--", *command]
  environment = {**environment, "JAX_NUM_CPU_DEVICES": "2"} if processes == 1 else environment
  return subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
  )


def features(folder: pathlib.Path) -> list[np.ndarray]:
  return [np.load(file)["features"] for file in sorted(folder.glob("part-*.npz"))]


def kill_session(leader: int) -> None:
  """It and all that it has started, which the launcher puts in process groups of their own."""
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
        os.kill(int(stat.parent.name), signal.SIGKILL)
    except OSError:
      pass  # it has just ended


def kill_at_random(run, out, processes, environment, chance) -> int:
  """Starts it again and again until it is done; returns how often it was killed."""
  kills, folder = 0, out.with_suffix(".parts")
  while True:
    process = start(processes, command(run, out), environment)
    before = len(list(folder.glob("part-*.npz")))
    while process.poll() is None and kills < KILLS and len(list(folder.glob("part-*.npz"))) == before:
      time.sleep(0.05)
    time.sleep(chance.uniform(0, 1.5))
    if kills < KILLS and process.poll() is None:
      kill_session(process.pid)
      kills += 1
    stderr = process.communicate()[1].decode()
    if process.returncode == 0:
      return kills
    assert process.returncode < 0 or kills, stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_it_ends_in_the_same_bits(fid_run, tmp_path, environment, processes):
  """On two devices, of one process or of two."""
  whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
  process = start(1, command(fid_run, whole), environment)
  assert process.communicate() and process.returncode == 0
  kills = kill_at_random(fid_run, killed, processes, environment, random.Random(processes))
  assert kills == KILLS
  expected, found = features(tmp_path / "whole.parts"), features(tmp_path / "killed.parts")
  assert len(found) == 10 and b"".join(x.tobytes() for x in found) == b"".join(x.tobytes() for x in expected)
  records = [json.loads(out.read_text())["fid"]["few"] for out in (whole, killed)]
  assert records[0]["task"] == "generation_fid" and records[0]["metrics"] == records[1]["metrics"]
  assert {"checkpoint": 3, "ema": True, "num_images": 40}.items() <= records[0]["protocol"].items()


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "fid needs the weights of Inception, --inception=FILE"),
    (["--inception=nowhere.pth"], "no file nowhere.pth"),
    (["--inception=weights.pth", "--num_images=1"], "num_images is 1; FID takes at least 2 images"),
  ],
)
def test_bad_input(run, environment, tmp_path, flags, message):
  folder = tmp_path / "run"
  shutil.copytree(run, folder)
  config = read_fields(folder)
  config["evals"] = {"few": section(40)}
  (folder / "config.json").write_text(json.dumps(config))
  bad = call("evaluate", environment, f"--workdir={folder}", f"--out={tmp_path}/out.json", *flags)
  assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("error: ")
  assert message in bad.stderr and [path.name for path in tmp_path.iterdir()] == ["run"]
