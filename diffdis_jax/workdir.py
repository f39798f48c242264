"""The folder of a run: config.json, and whether a run may go on under the present config."""

from __future__ import annotations

import json
import re
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from diffdis_jax.structs import UserError

MAY_CHANGE = (
  r"^(log|save|eval|sample)_every$",
  r"^(train_evals|sample_prompts|inference)(\.|$)",
  r"^keep",
  r"^(checkpoint|evals|mesh|profile)(\.|$)",
  r"^data\.loader\.(num_threads|prefetch)$",
)
"""Fields (dotted paths) that may differ when a run goes on: they leave the numbers of the training alone."""


def open_for_training(workdir: str, config: ConfigDict, *, is_writer: bool = True) -> epath.Path:
  """Creates the folder and writes its config.json, or checks that the run in it has the same config.

  Args:
    workdir: the folder; local, or any path that etils.epath reads.
    config: tuples, numbers, strings, booleans and None, nested.
    is_writer: whether this process writes; one of several processes does.

  Raises:
    UserError: the folder cannot be made, or holds a run whose config differs in a field outside MAY_CHANGE.
  """
  path = epath.Path(workdir)
  fields = _flatten(_normalise(config.to_dict()))
  if (path / "config.json").exists():
    _check_same(path, _flatten(_read(path)), fields)
  if is_writer:
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    try:
      path.mkdir(parents=True, exist_ok=True)
      write_whole(path / "config.json", text.encode())
    except OSError as error:
      raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
  return path


def load_config(workdir: str) -> ConfigDict:
  """The config of the run in this folder, locked. Sequences come back as tuples.

  Raises:
    UserError: no such folder, or no readable config.json in it.
  """
  path = epath.Path(workdir)
  if not path.is_dir():
    raise UserError(f"no folder {workdir}; --workdir names the folder of a training run")
  if not (path / "config.json").exists():
    raise UserError(f"no config.json in {workdir}; --workdir names the folder of a training run")
  return ConfigDict(_read(path)).lock()


def write_whole(path: epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(content)
  temporary.replace(path)


def _read(path: epath.Path) -> dict[str, Any]:
  try:
    return _normalise(json.loads((path / "config.json").read_text()))
  except ValueError as error:
    raise UserError(f"{path / 'config.json'} is not JSON: {error}") from error


def _normalise(value: Any) -> Any:
  """Lists, which are what JSON makes of tuples, as tuples again."""
  if isinstance(value, dict):
    return {key: _normalise(child) for key, child in value.items()}
  if isinstance(value, (list, tuple)):
    return tuple(map(_normalise, value))
  return value


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(value, dict) or not value:
    return {prefix.rstrip("."): value}
  return {path: leaf for key, child in value.items() for path, leaf in _flatten(child, f"{prefix}{key}.").items()}


def _check_same(path: epath.Path, there: dict[str, Any], here: dict[str, Any]) -> None:
  def shown(fields: dict[str, Any], field: str) -> str:
    return repr(fields[field]) if field in fields else "absent"

  differing = [
    f"{field} is {shown(there, field)} there and {shown(here, field)} here"
    for field in sorted(there.keys() | here.keys())
    if (field in there, there.get(field)) != (field in here, here.get(field))
    and not any(re.search(pattern, field) for pattern in MAY_CHANGE)
  ]
  if differing:
    raise UserError(f"{path} holds a run of another config: {', '.join(differing)}; take its config or a new --workdir")
