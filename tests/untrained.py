"""A run of the shapes config, much smaller and never trained, for tests of the verbs."""

from __future__ import annotations

import dataclasses
from typing import Any

from configs import shapes
from flax import nnx

from diffdis_jax import checkpoint, tree, workdir
from diffdis_jax.models import build

STEP = 3


@dataclasses.dataclass
class State:
  params: dict[str, Any]
  ema: dict[str, Any]
  opt_state: Any


def make_run(path: str) -> None:
  """Writes config.json and a checkpoint of step 3, whose averaged weights are zeros."""
  config = shapes.get_config()
  model = config.model
  model.unet.update(widths=(16, 16), num_heads=2, groups=4)
  model.alignment.update(width=16, depth=1, num_heads=2)
  model.text_encoder.update(width=16, depth=1, num_heads=2, mlp_width=16)
  model.autoencoder.update(widths=(8, 8, 8), groups=4)
  config.inference.update(generation_steps=2)
  config.evals = {"few": {"task": "zero_shot", "data": config.evals["test"].data.to_dict() | {"num_images": 128}}}
  workdir.open_for_training(path, config)
  module = build.make(model, objectives=config.objectives)(nnx.Rngs(0))
  params = tree.flatten(nnx.state(module))
  with checkpoint.Checkpointer(path) as checkpointer:
    checkpointer.save(STEP, State(params, {name: 0 * value for name, value in params.items()}, {}))
