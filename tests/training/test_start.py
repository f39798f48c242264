"""Test that a run must not freeze randomly initialised parameters unless its config allows it."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from diffdis_jax.common import files
from diffdis_jax.common.params import Params
from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.run import checkpoint
from diffdis_jax.training import start
from diffdis_jax.training.step import Trainer
from tests import steps
from tests.models.networks import random_params
from tests.steps import build_trainer

TOKENS = "^text_encoder.tokens"


def make_step(config: ConfigDict) -> Trainer:
  return build_trainer(config, steps.make_mesh())


def tiny_config(**changes: object) -> ConfigDict:
  """Make the tiny config, which allows only the token embeddings to be frozen at random values."""
  return steps.make_config(**{"optim.allow_uninitialized": TOKENS, **changes})


def save(params: Params, path: pathlib.Path) -> str:
  with checkpoint.Checkpointer(str(path)) as checkpointer:
    checkpointer.save(1, steps.TrainState(step=1, params=params, ema={}, opt_state=()))
  files.write_json(path / "config.json", Run.of(tiny_config()).to_dict())
  return str(path)


def frozen_at_random(trainer: Trainer, init_from: str = "") -> dict[str, int]:
  """Return the parts that the refusal of the run names, with their numbers of parameters."""
  try:
    start.find_initial(init_from, trainer)
  except UserError as error:
    assert "\n" not in str(error)
    [parts] = re.findall(r"parameters \((.*?)\)", str(error))
    return {part: int(number) for part, _, number in (entry.partition(" ") for entry in parts.split(", "))}
  return {}


@pytest.mark.parametrize(
  "name, arg, parts",
  [
    ("shapes", "", {"autoencoder"}),
    ("shapes", "autoencoder", set()),
    ("diffdis_cc3m", "", {"autoencoder", "text_encoder"}),
    ("diffdis_cc3m", "latents=somewhere", {"autoencoder", "text_encoder"}),
    ("diffdis_cc3m", "runlocal", set()),
  ],
)
def test_a_shipped_config_needs_its_frozen_parts_from_another_run(name, arg, parts):
  step = make_step(importlib.import_module(f"configs.{name}").get_config(arg))
  # All the parameters of a part are named, also the autoencoder's statistics.
  assert frozen_at_random(step) == {
    part: sum(path.startswith(f"{part}.") for path in step.shapes) for part in sorted(parts)
  }


def test_parameters_that_the_other_run_lacks_are_named(tmp_path):
  step = make_step(tiny_config(**{"optim.groups": (("^autoencoder|^text_encoder", "frozen"), (".*", "new"))}))
  params = random_params(step.shapes, seed=0)
  autoencoder = {path: value for path, value in params.items() if path.startswith("autoencoder.")}
  text = {path: value for path, value in params.items() if path.startswith("text_encoder.")}
  measured = ("autoencoder.shift", "autoencoder.scale")
  without = {path: value for path, value in (autoencoder | text).items() if path not in measured}

  assert frozen_at_random(step, save(autoencoder, tmp_path / "a")) == {"text_encoder": len(text) - 1}
  with pytest.raises(UserError, match=rf"that init_from={tmp_path / 'b'} does not have, the first autoencoder\.scale"):
    start.find_initial(save(without, tmp_path / "b"), step)
  names = start.find_initial(save(autoencoder | text, tmp_path / "c"), step)
  assert names == autoencoder.keys() | text.keys()


def test_a_start_with_other_fields_of_the_model_is_refused(tmp_path):
  """The shapes of parameters do not show the activation, heads or groups, so the parameters could be loaded."""
  config = tiny_config()
  step = make_step(config)
  path = save(random_params(step.shapes, seed=0), tmp_path / "run")
  assert start.find_initial(path, step) == step.shapes.keys()
  changes = {"autoencoder.groups": 2, "text_encoder.activation": "gelu", "unet.num_heads": 4}
  other = tiny_config(**{f"model.{field}": value for field, value in changes.items()})
  files.write_json(tmp_path / "run" / "config.json", Run.of(other).to_dict())
  fields = "--config.model.autoencoder.groups=2 --config.model.text_encoder.activation=gelu --config.model.unet.num_"
  with pytest.raises(UserError, match=f"was trained with other fields of model .*: give {fields}heads=4$"):
    start.find_initial(path, step)
