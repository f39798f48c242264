"""Trackers that get a run's numbers and pictures beside TensorBoard: Weights & Biases, and trackio.

A run's id is kept in its workdir, in trackers.json, so that a resumed run is the same run there. Both read their
settings from environment variables of their own, such as WANDB_MODE=offline and TRACKIO_DIR.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from diffdis_jax.common import buckets
from diffdis_jax.common.files import read_json, write_json
from diffdis_jax.errors import UserError, not_installed

PROJECT = "diffdis_jax"
FILE = "trackers.json"


class Tracker(NamedTuple):
  """A run of a tracker: `log` takes the step and values by name, `image` makes a value of a picture."""

  log: Callable[[int, Mapping[str, Any]], None]
  image: Callable[[UInt8[np.ndarray, "h w 3"]], Any]
  close: Callable[[], None]


def _wandb(id: str, name: str, config: Mapping[str, Any], folder: str | None) -> Tracker:
  """Open a run of Weights & Biases, with the step as a value over which curves are drawn.

  Its own count of steps only grows, and would refuse those that a run takes again after it was killed.
  """
  wandb: Any = importlib.import_module("wandb")
  options = {"id": id, "name": name, "resume": "allow", "config": dict(config), "dir": folder}
  options["project"] = os.environ.get("WANDB_PROJECT", PROJECT)
  try:
    run = wandb.init(**options)
  except wandb.errors.CommError as error:  # after a hundred seconds, of a server that does not answer
    logging.warning(
      "--tracker=wandb: %s; the numbers of this start are kept in %s/wandb, from where wandb sync sends them",
      " ".join(str(error).split()),
      folder or ".",
    )
    wandb.teardown()  # or else the id is still in use
    run = wandb.init(**options, mode="offline")
  run.define_metric("*", step_metric="step")
  return Tracker(lambda step, values: run.log({"step": step, **values}), wandb.Image, run.finish)


def _trackio(id: str, name: str, config: Mapping[str, Any], folder: str | None) -> Tracker:
  """Open a run of trackio, which resumes it by its name: the name has the id in it. TRACKIO_DIR says where it lies."""
  trackio: Any = importlib.import_module("trackio")
  project = os.environ.get("TRACKIO_PROJECT", PROJECT)
  own = dict(auto_log_gpu=False, auto_log_cpu=False)  # else curves of processor and memory come between
  run = trackio.init(project, name=f"{name}-{id}", resume="allow", config=dict(config), embed=False, **own)
  return Tracker(lambda step, values: run.log(dict(values), step=step), trackio.Image, run.finish)


TRACKERS = {"wandb": _wandb, "trackio": _trackio}


def check(kind: str) -> None:
  """Raise UserError if the tracker's package is not installed. An empty kind is no tracker."""
  if kind and importlib.util.find_spec(kind) is None:
    raise not_installed(f"--tracker={kind}", f"the package {kind}", kind)


def sign_in(kind: str) -> None:
  """Ask for the account that the numbers go to. Raises UserError if there is none."""
  # At the start, and not with the first numbers, before which a program is compiled or a set is measured.
  if kind == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
    wandb: Any = importlib.import_module("wandb")
    try:
      wandb.login(verify=False)  # a server that does not answer now may do so later
    except wandb.Error as error:
      raise UserError(f"--tracker=wandb: {error} With WANDB_MODE=offline the numbers stay here.") from error


def open_tracker(kind: str, workdir: epath.PathLike, config: Mapping[str, Any]) -> Tracker | None:
  """Open the tracker of the run in this folder: a new run there, or the one that was begun before.

  Args:
    kind: a key of TRACKERS; empty for none.
    workdir: folder of the run.
    config: of the run.
  """
  if not kind:
    return None
  path = buckets.path(workdir)
  folder = None if buckets.is_url(path) else str(pathlib.Path(path).resolve())
  return TRACKERS[kind](_run_id(path / FILE, kind), path.name, config, folder)


def _run_id(file: epath.Path, kind: str) -> str:
  try:
    ids = dict(read_json(file)) if file.exists() else {}
  except (UserError, TypeError, ValueError):  # of a power cut; the tracker then has a new run
    ids = {}
  if kind not in ids:
    ids[kind] = secrets.token_hex(4)
    write_json(file, ids)
  return ids[kind]
