"""The files that come with the package and have a name: config files, and trained models.

The former lie in the repository's `configs`. `diffdis_jax/configs` is a link to that folder, so that a wheel brings
them. The latter are files as one_file.py writes them, in `diffdis_jax/shipped`.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import pathlib
import sys

from absl import flags, logging

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
SUFFIX = ".safetensors"  # of a model
IMPORT_FIRST = "; weights of PyTorch take diffdis import_weights first"
# In a folder of diffusers, of open_clip and of transformers, whose config has the name of a run's.
_OF_PYTORCH = ("model_index.json", "open_clip_config.json", "model.safetensors", "pytorch_model.bin")
_SHOWN = 3  # of the runs below a folder
_SHARED = {"__init__", "common"}  # what the files have in common: no configs
_said: list[str] = []


def folder() -> pathlib.Path:
  """Return the folder of the config files."""
  return (_PACKAGE / "configs").resolve()


def names() -> dict[str, pathlib.Path]:
  """Return the config file of each name, such as `shapes`."""
  return {path.stem: path for path in sorted(folder().glob("*.py")) if path.stem not in _SHARED}


def models() -> dict[str, pathlib.Path]:
  """Return the file of each trained model's name."""
  return {path.stem: path for path in sorted((_PACKAGE / "shipped").glob(f"*{SUFFIX}"))}


def meant(given: str | os.PathLike[str]) -> str:
  """Say what a path that is no workdir may mean: a trained model of almost this name, one of the runs below the folder,
  or weights of PyTorch that have to be imported. Return an empty text where nothing is near."""
  if os.path.isfile(given) or any(os.path.isfile(os.path.join(given, name)) for name in _OF_PYTORCH):
    return IMPORT_FIRST
  path = pathlib.Path(given)
  if below := sorted(file.parent for deep in ("*", "runs/*") for file in path.glob(f"{deep}/config.json")):
    more = f" and {len(below) - _SHOWN} more" if len(below) > _SHOWN else ""
    return f"; below it are {', '.join(map(str, below[:_SHOWN]))}{more}"
  near = difflib.get_close_matches(os.fspath(given), models(), n=1)
  return f"; did you mean {near[0]}?" if near else ""


def say(line: str) -> None:
  """Log a line of a config file; before the flags are parsed, when nothing can be logged, keep it for `log_said`."""
  _said.append(line)
  if flags.FLAGS.is_parsed():
    log_said()


def log_said() -> None:
  """Log what config files have said so far."""
  while _said:
    logging.info("%s", _said.pop(0))


def provide(file: str | os.PathLike[str]) -> None:
  """Make `from configs import common` work in a config file, wherever it lies and wherever the command was typed.

  A folder `configs` where the command was typed is a part of that package too, and of a file of one's own the first.
  """
  theirs, ours = (pathlib.Path.cwd() / "configs").resolve(), folder()
  of_their_own = theirs.is_dir() and ours not in pathlib.Path(file).resolve().parents
  places = list(dict.fromkeys(map(str, [theirs, ours] if of_their_own else [ours])))
  if getattr(sys.modules.get("configs"), "__path__", None) == places:
    return
  # The package is of another folder, or was never imported: what hangs on it is imported again, from the new places.
  for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
    del sys.modules[name]
  spec = importlib.util.spec_from_file_location("configs", ours / "__init__.py", submodule_search_locations=places)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules["configs"] = module
  spec.loader.exec_module(module)
