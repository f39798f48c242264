"""Writes CLIP's parameters to a folder that transformers' CLIPModel and open_clip load, without PyTorch.

Both libraries' files lie in one folder, as in those that are shared: config.json and model.safetensors, and
open_clip_config.json and open_clip_model.safetensors.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffdis_jax.common.params import Params
from diffdis_jax.errors import UserError
from diffdis_jax.interop import mapping, openclip, sections, tensor_files, to_torch
from diffdis_jax.models.clip import PIXEL_MEAN, PIXEL_STD, resize_positions

TRANSFORMERS, OPEN_CLIP = "model.safetensors", "open_clip_model.safetensors"
POSITIONS, TEXT_POSITIONS = "vision_encoder.positions", "text_encoder.positions"


def check(model: Mapping[str, Any]) -> None:
  """Raise UserError for a network that the two libraries cannot hold."""
  text, vision = model["text_encoder"], model["vision_encoder"]
  for field in ("spatial_pool", "convolutional"):
    if value := vision.get(field):
      wanted = f"neither library has such a tower, so only a run with {type(value)()} can be exported"
      raise _unsupported(f"vision_encoder.{field}", value, wanted)
  # transformers has an activation for each tower; open_clip's `quick_gelu` is one switch.
  if text["activation"] != vision["activation"]:
    wanted = f"open_clip has one for both towers, and model.vision_encoder.activation is {vision['activation']}"
    raise _unsupported("text_encoder.activation", text["activation"], wanted)
  if weight := text.get("token_embedding_weight"):
    wanted = "neither library has such token vectors, so only a run with 0 can be exported"
    raise _unsupported("text_encoder.token_embedding_weight", weight, wanted)
  if text["eos_id"] != text["vocab_size"] - 1:
    wanted = f"open_clip takes the largest token, {text['vocab_size'] - 1}, for the end of a text"
    raise _unsupported("text_encoder.eos_id", text["eos_id"], wanted)


def _unsupported(field: str, value: Any, wanted: str) -> UserError:
  return sections.unsupported("the run's config", f"model.{field}", value, wanted)


def write(
  folder: pathlib.Path,
  params: Params,
  *,
  model: Mapping[str, Any],
  image_size: int,
  max_length: int,
  dtype: str = "float32",
) -> None:
  """Write weights and configs of both libraries, the tokenizer excepted.

  Args:
    folder: empty.
    params: all of a run's parameters.
    model: the config's section.
    image_size: of the run's images. Positions of another size are written as the run interpolates them for it.
    max_length: of the run's captions. Positions behind it, which were not trained, are left out: open_clip takes texts
      as long as its table.
    dtype: of the files, a key of to_torch.DTYPES.

  Raises:
    UserError: a network that the two cannot hold, or values beyond the dtype's range.
  """
  check(model)
  side = image_size // model["vision_encoder"]["patch"]
  vision = {**model["vision_encoder"], "image_size": image_size}
  text = {**model["text_encoder"], "max_length": max_length}
  params = {
    **params,
    POSITIONS: resize_positions(jnp.asarray(params[POSITIONS]), rows=side, columns=side),
    TEXT_POSITIONS: params[TEXT_POSITIONS][:max_length],
  }
  arrays: dict[str, dict[str, Any]] = {"clip": {}, "head": {}}
  for entry in (mapping.from_path(path, mapping.CLIP) for path in params):
    arrays[entry.component][entry.name] = to_torch.convert(entry, params[entry.path], dtype)
  # A file of its own: transformers and open_clip have no place for a head, and warn of names that they do not know.
  if arrays["head"]:
    tensor_files.save(arrays["head"], folder / tensor_files.HEAD)
  tensor_files.save(arrays["clip"], folder / TRANSFORMERS)
  # f32, since bf16 moves its exponential by up to 1.6 %. Not for transformers, of which some versions take the first
  # parameter's dtype for that of all.
  arrays["clip"]["logit_scale"] = np.asarray(params["logit_scale"], np.float32)
  tensor_files.save(openclip.restore(arrays["clip"]), folder / OPEN_CLIP)
  # Last: a folder without configs is one whose export was cut off, which neither library loads.
  configs = {
    "config.json": sections.write_clip(text, vision),
    "preprocessor_config.json": _preprocessor(image_size),
    "open_clip_config.json": openclip.write_config({"text_encoder": text, "vision_encoder": vision}),
  }
  to_torch.write_configs(folder, configs)


def _preprocessor(image_size: int) -> dict[str, Any]:
  """Return transformers' CLIPImageProcessor: short side to the size, bicubic, then the central square."""
  return dict(
    image_processor_type="CLIPImageProcessor",
    do_convert_rgb=True,
    do_resize=True,
    size=dict(shortest_edge=image_size),
    resample=3,
    do_center_crop=True,
    crop_size=dict(height=image_size, width=image_size),
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=PIXEL_MEAN,
    image_std=PIXEL_STD,
  )
