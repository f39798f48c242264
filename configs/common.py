"""Functions that the config files share. No config imports jax."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffdis_jax.common import buckets
from diffdis_jax.common.files import read_json
from diffdis_jax.config import base as base
from diffdis_jax.config import read_fields
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.errors import UserError

CC3M_PAIRS = 2_905_954  # the paper's count; prepare_data counts the links that still work


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> ConfigDict:
  """Parse the part of `--config=FILE.py:arg` behind the colon, such as `runlocal,fusion=False,gamma=0.3`.

  Args:
    arg: comma-separated `key=value`; a bare `key` means True. None or empty takes all defaults.
    **defaults: the known keys; a value is read as the type of its default.

  Raises:
    ValueError: an unknown or repeated key, a value of another type, or none where it would be text.
  """
  values = ConfigDict(defaults)
  parsed_keys = set()
  for entry in filter(None, (arg or "").split(",")):
    key, equals, text = entry.partition("=")
    if key not in defaults:
      near = difflib.get_close_matches(key, defaults, n=1)
      guess = f"; did you mean {near[0]}?" if near else ""
      raise ValueError(f"unknown argument {key!r}; known: {', '.join(sorted(defaults)) or 'none'}{guess}")
    if key in parsed_keys:
      raise ValueError(f"argument {key!r} is given twice")
    # A value may also be empty because a variable of the shell is not set.
    if not text and isinstance(defaults[key], str):
      raise ValueError(f"argument {key!r} has no value; write it as {key}=VALUE")
    parsed_keys.add(key)
    values[key] = _read(key, text if equals else "True", type(defaults[key]))
  return values


def check_choices(args: ConfigDict, **choices: Collection[Any]) -> None:
  """Raise ValueError unless each of these arguments is one of its choices."""
  for name, allowed in choices.items():
    if args[name] not in allowed:
      raise ValueError(f"argument {name}={args[name]} should be one of {', '.join(map(str, allowed))}")


def _read(key: str, text: str, kind: type) -> Any:
  if kind is bool and text.lower() in ("true", "1", "false", "0"):
    return text.lower() in ("true", "1")
  try:
    if kind is not bool:
      return kind(text)
  except ValueError:
    pass
  raise ValueError(f"argument {key}={text} should be of type {kind.__name__}")


# The fields of a config that define what the weights mean.
OF_NETWORK = ("model", "image_size", "image_diffusion", "text_diffusion", "condition_timestep", "inference")


def take_network(config: ConfigDict, path: str, *, argument: str = "init") -> dict[str, Any]:
  """Replace the config's network by that of the run in `path`, name the run in `init_from`, and return its config.

  Raises:
    ValueError: no run there; `argument` is what named it.
  """
  try:
    buckets.check(path)
    fields = read_fields(path)
    put_network(config, fields)
  except (OSError, UserError, ValueError, KeyError, TypeError) as error:
    # A wrong path's error is a sentence. A damaged config's error may be a bare name, so its type is added.
    message = error if isinstance(error, (OSError, UserError)) else repr(error)
    raise ValueError(f"argument {argument}={path} should be the workdir of a run: {message}") from error
  config.init_from = path
  return fields


def take_start(config: ConfigDict, args: ConfigDict) -> dict[str, Any]:
  """Call `take_network` with argument `init`. Raise ValueError if no run is there, or if `backbone=clip` and it is not
  CLIP."""
  fields = take_network(config, args.init)
  if args.backbone == "clip" and "vision_encoder" not in config.model:
    raise ValueError(f"argument backbone=clip: init={args.init} is a run of DiffDis; give one of CLIP there")
  return fields


def put_network(config: ConfigDict, fields: Mapping[str, Any]) -> None:
  """Replace the config's network by the fields of a run's config, except for its head."""
  for name in OF_NETWORK:
    config[name] = ConfigDict(fields[name]) if isinstance(fields[name], dict) else fields[name]
  config.data.max_length = fields["data"]["max_length"]
  if "head" in config.model:
    del config.model.head


def num_pairs(path: str) -> dict[str, int]:
  """Return the number of pairs of each split of a data set that prepare_data wrote.

  Raises:
    ValueError: no data set there, no split `train` in it, or an unreadable path.
  """
  try:
    buckets.check(path)
  except UserError as error:
    raise ValueError(f"argument path={path}: {error}") from error
  splits = read_prepared(path, "dataset_info.json").get("splits", ())
  try:
    counts = {split["name"]: sum(map(int, split["shardLengths"])) for split in splits}
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}/dataset_info.json is damaged: {error!r}; prepare the data set again") from error
  if "train" not in counts:
    problem = f"no split train in {path}, only {', '.join(counts)}" if counts else f"no prepared data set in {path}"
    # prepare_data would not overwrite what is already there, such as the images.
    out = "NEW_FOLDER" if buckets.path(path).exists() else shlex.quote(path)
    raise ValueError(f"{problem}; write one with diffdis prepare_data files --source=PICTURES --out={out}")
  return counts


def read_prepared(path: str, name: str) -> dict[str, Any]:
  """Return the content of a prepared data set's JSON file, or {} if it is absent. Raise ValueError if it is damaged."""
  file = buckets.path(path) / name
  try:
    return dict(read_json(file)) if file.exists() else {}
  except (UserError, TypeError, ValueError) as error:
    raise ValueError(f"{error}; prepare the data set again") from error


def own_size(config: ConfigDict) -> Any:
  """Return a reference to the run's image_size, so that evaluation data follow a later --config.image_size."""
  # Each caller gets its own reference; setting it changes no other reference and not the run's size.
  return config.get_ref("image_size") + 0


def evaluations(args: ConfigDict, image_size: Any) -> ConfigDict:
  """Return evaluations of the sets that the arguments name: zero-shot classification on imagenet, retrieval on
  Karpathy's test splits of coco and flickr, and the losses on split `val` of held_out."""

  def data(path: str, split: str) -> dict[str, Any]:
    return dict(name="pairs", path=path, split=split, image_size=image_size + 0)  # as in own_size

  sets = ConfigDict()
  if args.imagenet_names and not args.imagenet:
    raise ValueError("imagenet_names has no effect without imagenet=DIR")
  if args.imagenet:
    sets.imagenet = dict(
      task="zero_shot",
      data=data(args.imagenet, "val"),
      classnames=args.imagenet_names,
      label_field="label" if args.imagenet_names else "caption",
      # These are the names and templates of `evaluate --suite`; the paper does not state its own.
      templates=class_lists.load()["imagenet1k"].templates,
      single_template="a photo of a {}.",
      # Training waits, so it measures the same 5,000 of 50,000 images each time. evaluate --num_images=50000 takes all.
      num_images=5000,
    )
  for name in ("coco", "flickr"):
    if args[name]:
      sets[name] = dict(task="retrieval", data=data(args[name], "test"))
  if args.held_out:
    sets.held_out = held_out_loss(data(args.held_out, "val"))
  return sets


def held_out_loss(data: dict[str, Any]) -> dict[str, Any]:
  """Return the evaluation of the losses on the same 256 held-out pairs. There are no more, since training waits."""
  return dict(task="held_out_loss", data=data, num_images=256)
