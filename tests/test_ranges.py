"""Test that every number of a config outside its range is refused in one line, before a file is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import common
from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.training import loop
from tests import tiny, tiny_clip

ANY_FINITE = {"model.autoencoder.shift"}  # may be negative
OUTSIDE = {
  "seed": 2**32,
  "condition_timestep": 1001,
  "text_diffusion.gamma": 2.0,
  "loss.condition_dropout": 1.5,
  "loss.image_dropout": 1.0,
  "optim.final_fraction": 1.5,
  "optim.b1": 1.0,
  "optim.b2": 1.0,
  "optim.ema_decay": 1.5,
  "data.max_length": 9,
  "data.augment.crop_scale": (0.5, 1.5),
  "data.augment.crop_ratio": (0.5, 1.0, 2.0),
  "data.loader.num_workers": 10**6,
  "num_steps": 10**400,
  "image_size": 16384,
  "batch_size": 10**12,
  "data.augment.shift": 1.5,
  "data.augment.randaugment_magnitude": 31,
  "inference.steps": 1001,
  "inference.generation_steps": 1000,
  "model.temperature": 100.5,
  "model.text_encoder.eos_id": 49408,
  "optim.eps": 0.0,
  "optim.accumulate": 0,
  "checkpoint.keep_last": 0,
  "inference.num_noise_samples": 0,
  "model.autoencoder.scale": 0.0,
  "mesh.fsdp": 0,
}


def numbers(section: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yield the dotted path and the value of every number and of every sequence of numbers."""
  is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      yield from numbers(value, f"{prefix}{name}.")
    elif is_number(value) or (isinstance(value, tuple) and value and all(map(is_number, value))):
      yield f"{prefix}{name}", value


FIELDS = dict(numbers(common.base(tiny.get_config().model, image_size=16)))
CLIP_FIELDS = {name: value for name, value in numbers(tiny_clip.get_config()) if name.startswith("model.")}


def refused(tmp_path, field: str, value: Any, config: ConfigDict) -> None:
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=field.split(".")[-1]) as error:
    loop.train_and_evaluate(Run.of(config), str(tmp_path / "run"))
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("get_config, fields", [(tiny.get_config, FIELDS), (tiny_clip.get_config, CLIP_FIELDS)])
def test_negative_numbers_and_numbers_that_are_not_finite_are_refused(tmp_path, get_config, fields):
  assert len(FIELDS) > 70 and OUTSIDE.keys() <= FIELDS.keys()
  for field, value in fields.items():
    refuses_wrong_numbers(tmp_path, field, value, get_config)


def refuses_wrong_numbers(tmp_path, field: str, value: Any, get_config: Callable[[], ConfigDict]) -> None:
  wrong = [] if field in ANY_FINITE else [-5]
  if isinstance(value, float) or (isinstance(value, tuple) and isinstance(value[0], float)):
    wrong += [math.nan, math.inf]
  for number in wrong:
    number = type(value)(number) if not isinstance(value, tuple) else (type(value[0])(number), *value[1:])
    refused(tmp_path, field, number, get_config())


@pytest.mark.parametrize("field, value", OUTSIDE.items())
def test_a_number_outside_its_range_is_refused(tmp_path, field, value):
  refused(tmp_path, field, value, tiny.get_config())
