"""Define a run's config: each field with its default and range, and the record that the code works with. No jax.

A config file fills in a ConfigDict, and a workdir's config.json holds it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from diffdis_jax.common import buckets, one_file
from diffdis_jax.common.files import read_json
from diffdis_jax.config.run import Run, default_fields
from diffdis_jax.config.section import normalise
from diffdis_jax.errors import UserError, parse_json

__all__ = ["Run", "as_text", "base", "load", "read_fields", "read_json_object", "with_evals"]

DIGEST = "digest"  # the field of config.json with the digest of the others
SECTIONS = {"objectives", "model", "data", "optim"}  # sections of every run's config
EXAMPLE = '{"name": "coco", "task": "retrieval", "data": {"path": "DIR", "split": "test"}}'  # an example of --eval


def base(model: ConfigDict, *, image_size: int) -> ConfigDict:
  """Return all fields of a run with their defaults: both objectives, a frozen autoencoder, and all other parameters
  random and trained at one learning rate."""
  return ConfigDict({**default_fields(), "image_size": image_size, "model": model})


def load(path: epath.PathLike) -> Run:
  """Return the record of the run in a workdir. Raises UserError as `read_fields` and `Run.of` do."""
  fields = read_fields(path)
  try:
    return Run.of(fields)
  except UserError as error:
    raise UserError(f"{buckets.path(path) / 'config.json'}: {error}") from error


def read_fields(workdir: epath.PathLike) -> dict[str, Any]:
  """Return the config of the run in this folder or file, unchecked. Sequences come back as tuples.

  Raises:
    UserError: no such folder, no config.json of a run in it, or a damaged file.
  """
  if (file := one_file.at(workdir)) is not None:
    return normalise(one_file.read_record(file).config)
  path = buckets.path(workdir)
  if not (path / "config.json").exists():  # raises if the bucket is unreachable, while `is_dir` would return False
    what = "config.json in" if path.is_dir() else "folder"
    raise UserError(f"no {what} {workdir}; give the folder of a training run{one_file.meant(workdir)}")
  config = read_json_object(path)
  if missing := SECTIONS - config.keys():
    raise UserError(
      f"{path / 'config.json'} is of no training run, it has no {min(missing)!r}; give the folder of one"
      f"{one_file.meant(workdir)}"
    )
  return config


def read_json_object(path: epath.Path) -> dict[str, Any]:
  """Read config.json in this folder. Raise UserError: it has no JSON object, or was changed."""
  file = path / "config.json"
  config = normalise(read_json(file))
  if not isinstance(config, dict):
    raise UserError(f"{file} is of no training run; it should hold a JSON object")
  if config.pop(DIGEST, digest := digest_of(config)) != digest:
    raise UserError(
      f"{file} is not as it was written: it is damaged, or was edited; take it from a copy of the run, or remove its"
      f' line "{DIGEST}" to use it as it is'
    )
  return config


def as_text(config: Mapping[str, Any]) -> str:
  """Return the text of config.json, with a digest of the fields, so that damage is noticed."""
  return json.dumps({**config, DIGEST: digest_of(config)}, indent=2, sort_keys=True) + "\n"


def digest_of(fields: Mapping[str, Any]) -> str:
  """Return sixteen hexadecimal digits for the fields of a config, independent of their order in the file."""
  kept = {name: value for name, value in fields.items() if name != DIGEST}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def with_evals(config: ConfigDict, texts: Sequence[str]) -> ConfigDict:
  """Return the config with more evaluations in `evals` and `train_evals`, locked.

  Args:
    config: the config of a run.
    texts: JSON objects, each with the `name` of the data set, the `task`, and its settings. In `data`, `name` is
      `pairs` and `image_size` is the run's by default.

  Raises:
    UserError: not such an object, or a name that is missing, taken, or not a word.
  """
  config = config.copy_and_resolve_references().unlock()  # --config locks it against misspelt fields
  for text in texts:
    settings = parse_json(text, f"--eval={text}")
    name = settings.pop("name", None) if isinstance(settings, dict) else None
    # The name becomes the part before the slash in metric names.
    is_new = isinstance(name, str) and re.fullmatch(r"[\w-]+", name) and name not in config.evals
    if not is_new or not isinstance(settings.get("task"), str):
      raise UserError(
        f"--eval={text} should be an object with a task and a name of letters, digits, - and _, which no evaluation of"
        f" the config has, such as '{EXAMPLE}'"
      )
    if isinstance(settings.get("data"), dict):
      # Check here, since the check of addresses in flags and fields does not look into JSON.
      buckets.check(str(settings["data"].get("path", "")))
      settings["data"] = {"name": "pairs", "image_size": config.image_size} | settings["data"]
    config.evals[name] = settings
    config.train_evals = (*config.train_evals, name)
  return config.lock()
