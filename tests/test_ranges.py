"""Test that every number of a config knows its range, and refuses another one in one line before a file is written."""

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

# Whose numbers may be negative.
ANY_FINITE = {"model.autoencoder.shift"}
# -1 takes the devices that the other axes leave.
MESH = {"mesh.data", "mesh.fsdp", "mesh.tensor"}
TOO_LARGE = {
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
  "data.loader.num_threads": 10**6,
  "data.loader.num_workers": 10**6,
  "data.loader.prefetch": 10**6,
  "num_steps": 10**400,
  "image_size": 16384,
  "batch_size": 10**12,
  "data.augment.shift": 1.5,
  "data.augment.rotation": 181.0,
  "data.augment.brightness": 1.5,
  "data.augment.contrast": 1.5,
  "data.augment.saturation": 1.5,
  "data.augment.hue": 0.6,
  "data.augment.randaugment_magnitude": 31,
  "inference.steps": 1001,
  "inference.generation_steps": 1000,
  "model.temperature": 100.5,
  "model.text_encoder.bos_id": 49408,
  "model.text_encoder.eos_id": 49408,
}
ZERO = {
  "text_diffusion.gamma": 0.0,
  "optim.eps": 0.0,
  "optim.accumulate": 0,
  "batch_size": 0,
  "num_steps": 0,
  "log_every": 0,
  "image_size": 0,
  "checkpoint.keep_last": 0,
  "inference.num_noise_samples": 0,
  "model.autoencoder.scale": 0.0,
  "model.temperature": 0.0,
  "mesh.fsdp": 0,
  "data.loader.prefetch": 0,
}


def numbers(section: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Dotted path and value of every number, and of every sequence of numbers."""
  is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      yield from numbers(value, f"{prefix}{name}.")
    elif is_number(value) or (isinstance(value, tuple) and value and all(map(is_number, value))):
      yield f"{prefix}{name}", value


FIELDS = dict(numbers(common.base(tiny.get_config().model, image_size=16)))


CLIP_FIELDS = {name: value for name, value in numbers(tiny_clip.get_config()) if name.startswith("model.")}


def refused(tmp_path, field: str, value: Any, config: ConfigDict | None = None) -> None:
  config = config or tiny.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=field.split(".")[-1]) as error:
    loop.train_and_evaluate(Run.of(config), str(tmp_path / "run"))
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_all_fields_are_walked_over():
  assert len(FIELDS) > 70 and TOO_LARGE.keys() <= FIELDS.keys() and ZERO.keys() <= FIELDS.keys()


@pytest.mark.parametrize("field", FIELDS)
def test_no_number_is_taken_unseen(tmp_path, field):
  refuses_wrong_numbers(tmp_path, field, FIELDS[field], tiny.get_config)


@pytest.mark.parametrize("field", CLIP_FIELDS)
def test_no_number_of_a_clip_is_taken_unseen(tmp_path, field):
  refuses_wrong_numbers(tmp_path, field, CLIP_FIELDS[field], tiny_clip.get_config)


def refuses_wrong_numbers(tmp_path, field: str, value: Any, get_config: Callable[[], ConfigDict]) -> None:
  wrong = [] if field in ANY_FINITE else [-5]
  if isinstance(value, float) or (isinstance(value, tuple) and isinstance(value[0], float)):
    wrong += [math.nan, math.inf]
  for number in wrong:
    number = type(value)(number) if not isinstance(value, tuple) else (type(value[0])(number), *value[1:])
    refused(tmp_path, field, number, get_config())


@pytest.mark.parametrize("field, value", [*TOO_LARGE.items(), *ZERO.items()])
def test_a_bound_is_where_it_is_said_to_be(tmp_path, field, value):
  refused(tmp_path, field, value)
