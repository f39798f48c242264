"""A run made by an earlier version still loads, goes on, evaluates, generates and exports to the same numbers.

`before/run.tar.xz` is the workdir of a small joint run after 4 of its 8 steps; `expected.json` and `expected.npz` are
what the version that wrote it measured of it, and how it went on.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import tarfile
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import common
from diffdis_jax import evaluate, export_weights, inference
from diffdis_jax.config import Run
from diffdis_jax.data import shapes
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.run import workdir
from diffdis_jax.training import loop

BEFORE = pathlib.Path(__file__).parent / "before"
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())


@pytest.fixture
def run(tmp_path: pathlib.Path) -> str:
  with tarfile.open(BEFORE / "run.tar.xz") as tar:
    tar.extractall(tmp_path, filter="data")
  return str(tmp_path / "run")


def test_it_embeds_and_draws_the_same(run):
  model, params = inference.load(run)
  tokens = Tokenizer(model.max_length)(list(shapes.CLASSNAMES[:16]))
  source = shapes.Shapes(split="test", image_size=16, seed=1, num_images=16)
  images = np.stack([source[i]["image"] for i in range(16)])
  expected = np.load(BEFORE / "expected.npz")
  np.testing.assert_allclose(model.embed_texts(params, tokens), expected["texts"], atol=1e-5)
  np.testing.assert_allclose(model.embed_images(params, images, seed=0), expected["images"], atol=1e-4)
  for name, found in (
    ("drawn", model.generate(params, tokens[:4], model.noise(4, seed=0))),
    ("reconstructed", model.reconstruct(params, images[:4])),
  ):
    assert np.abs(found.astype(int) - expected[name].astype(int)).max() <= 1, name


def test_it_goes_on_to_the_same_numbers_and_evaluates_to_them(run):
  found = evaluate.evaluate(run, evaluate.sections_of_config(workdir.load_config(run).evals.to_dict(), tasks=None))
  for task, sets in EXPECTED["evaluations"].items():
    for name, metrics in sets.items():
      now = found[task][name]["metrics"]
      # One image more or less, where rounding decides between two classes.
      np.testing.assert_allclose(
        [now[metric] for metric in metrics], list(metrics.values()), atol=1.5 / 64, err_msg=f"{task} {name}"
      )

  # Its config as one made today has it, with the fields that came since.
  config = common.base(ConfigDict(), image_size=16)
  config.update(workdir.load_config(run).copy_and_resolve_references().unlock())
  assert "allow_uninitialized" not in json.loads((pathlib.Path(run) / "config.json").read_text())["optim"]
  assert config.optim.allow_uninitialized == common.base(ConfigDict(), image_size=16).optim.allow_uninitialized
  config.train_evals = ()
  loop.train_and_evaluate(Run.of(config), run)
  lines = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
  trained = [line for line in EXPECTED["metrics"] if "loss" in line]
  assert [line["step"] for line in lines] == [line["step"] for line in trained] == list(range(1, 9))
  for line, expected in zip(lines, trained):
    for name in ("loss", "grad_norm", "loss_generation", "loss_discrimination", "loss_generation_q1", "temperature"):
      np.testing.assert_allclose(line[name], expected[name], rtol=1e-3, err_msg=f"{name} of step {line['step']}")


def test_it_exports_the_same_files(run, tmp_path):
  out = tmp_path / "exported"
  export_weights.export_weights(run, str(out))
  found = {
    f"{path.relative_to(out)}:{name}": hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    for path in out.rglob("*.safetensors")
    for name, value in load_file(path).items()
  }
  assert found == EXPECTED["exported"]
  for name, content in EXPECTED["exported_configs"].items():
    assert json.loads((out / name).read_text()) == content, name
