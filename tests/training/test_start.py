"""What a run starts from: nothing that it freezes may be random, unless the config says so."""

from __future__ import annotations

import importlib
import pathlib
import re

import gcsfs
import pytest
from etils import epath
from ml_collections import ConfigDict

from diffdis_jax.common import files, storage
from diffdis_jax.common.params import Params
from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.run import checkpoint, provenance
from diffdis_jax.training import loop, start
from diffdis_jax.training.step import Trainer
from tests import steps, tiny
from tests.models.networks import random_params
from tests.steps import build_trainer

TOKENS = "^text_encoder.tokens"
NOTHING = "^$"


def make_step(config: ConfigDict) -> Trainer:
  return build_trainer(config, steps.make_mesh())


def tiny_config(**changes: object) -> ConfigDict:
  """The tiny config with nothing random on purpose but the token table, as in the config that it is made from."""
  return steps.make_config(**{"optim.allow_uninitialized": TOKENS, **changes})


def save(params: Params, path: pathlib.Path) -> str:
  with checkpoint.Checkpointer(str(path)) as checkpointer:
    checkpointer.save(1, steps.TrainState(step=1, params=params, ema={}, opt_state=()))
  files.write_json(path / "config.json", Run.of(tiny_config()).to_dict())
  return str(path)


def frozen_at_random(trainer: Trainer, init_from: str = "") -> dict[str, int]:
  """Part -> how many of its parameters the run is refused for."""
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
def test_what_a_shipped_config_needs_from_another_run(name, arg, parts):
  step = make_step(importlib.import_module(f"configs.{name}").get_config(arg))
  # All of a part, the autoencoder's statistics included.
  assert frozen_at_random(step) == {
    part: sum(path.startswith(f"{part}.") for path in step.shapes) for part in sorted(parts)
  }


def test_the_message_names_the_first_how_many_and_the_mend():
  step = make_step(tiny_config())
  number = sum(path.startswith("autoencoder.") for path in step.shapes)
  message = (
    rf"optim\.groups freezes {number} parameters \(autoencoder {number}\) that nothing was loaded for, the first"
    r" autoencoder\.conv_in\.\w+; load them \(--config\.init_from=WORKDIR of import_weights or of an autoencoder's run"
    r"\), train them \(optim\.groups\), or name them in optim\.allow_uninitialized"
  )
  with pytest.raises(UserError, match=message):
    start.find_initial("", step)


def test_what_the_other_run_does_not_have(tmp_path):
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


def test_parts_that_would_compute_something_else(tmp_path, monkeypatch):
  """Of an activation, heads and groups no parameter's shape says anything, so that all of them are loaded."""
  config = tiny_config()
  step = make_step(config)
  path = save(random_params(step.shapes, seed=0), tmp_path / "run")
  assert start.find_initial(path, step) == step.shapes.keys()
  changes = {"autoencoder.groups": 2, "text_encoder.activation": "gelu", "unet.num_heads": 4}
  other = tiny_config(**{f"model.{field}": value for field, value in changes.items()})
  files.write_json(tmp_path / "run" / "config.json", Run.of(other).to_dict())
  message = (
    f"init_from={path} was trained with other fields of model than this config has, by which its weights compute"
    " something else: give --config.model.autoencoder.groups=2 --config.model.text_encoder.activation=gelu"
    " --config.model.unet.num_heads=4"
  )
  with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
    start.find_initial(path, step)
  read = type(epath.Path()).read_bytes

  def away(path):
    if path.name == "config.json":
      raise gcsfs.retry.HttpError({"code": 503, "message": "backend error"})
    return read(path)

  monkeypatch.setattr(type(epath.Path()), "read_bytes", away)
  monkeypatch.setattr(storage, "PATIENCE", 0.0)
  with pytest.raises(storage.Away):  # on which a launcher starts the run again
    start.find_initial(path, step)


def test_a_run_is_refused_before_its_workdir_is_made(tmp_path):
  config = tiny.get_config()
  config.optim.allow_uninitialized = TOKENS
  provenance.code.cache_clear()
  with pytest.raises(UserError, match="optim.groups freezes"):
    loop.train_and_evaluate(Run.of(config), str(tmp_path / "run"))
  assert not list(tmp_path.iterdir())
  assert provenance.code.cache_info().currsize == 1  # asked before all else: a commit meanwhile is not what runs


def test_statistics_are_measured_by_a_run_of_the_autoencoder():
  step = make_step(steps.make_config("reconstruction", **{"optim.allow_uninitialized": NOTHING}))
  assert start.find_initial("", step) == set()


def test_a_regex_that_is_none():
  with pytest.raises(UserError, match=r"optim.allow_uninitialized has '\(', which is no regular expression"):
    make_step(steps.make_config(**{"optim.allow_uninitialized": "("}))
