"""Make a run of the shapes config with a much smaller, untrained network, for the tests of commands."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from configs import shapes
from diffdis_jax.run import checkpoint, workdir
from diffdis_jax.structs import TrainState
from tests.once import made_once
from tests.steps import network_of

STEP = 3


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
  """Return the workdir, which all test files share, of a run with a checkpoint of step 3."""
  return str(made_once(tmp_path_factory, "untrained", _make_run))


def _make_run(folder: pathlib.Path) -> None:
  path = str(folder)
  config = shapes.get_config()
  config.model.unet.update(widths=(16, 16), num_heads=2, groups=4)
  config.model.alignment.update(width=16, depth=1, num_heads=2)
  config.model.text_encoder.update(width=16, depth=1, num_heads=2, mlp_width=16)
  config.model.autoencoder.update(widths=(8, 8, 8), groups=4)
  config.inference.update(generation_steps=2)
  config.evals = {"few": {"task": "zero_shot", "data": config.evals["test"].data.to_dict() | {"num_images": 128}}}
  config.train_evals, config.checkpoint.best_metric, config.checkpoint.keep_best = (), "", 0
  workdir.open_for_training(path, config.to_dict())
  rng = np.random.default_rng(0)
  abstract = network_of(config).shapes
  params = {name: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype) for name, leaf in abstract.items()}
  with checkpoint.Checkpointer(path) as checkpointer:
    checkpointer.save(STEP, TrainState(params=params, ema=params))
