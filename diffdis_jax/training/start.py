"""The state that a run starts from: its last checkpoint, another run's parameters, or fresh ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.params import Params
from diffdis_jax.run import checkpoint
from diffdis_jax.training.step import Step, TrainState


def restore_or_init(
  init_from: str, seed: int, trainer: Step, checkpointer: checkpoint.Checkpointer, iterator: grain.DatasetIterator
) -> tuple[TrainState, dict[str, Any]]:
  """The last checkpoint's state and meta, with the data iterator set to its next batch; or the state of step 0."""
  step = checkpointer.latest_step()
  if step is not None:
    restored = checkpointer.restore(step, trainer.abstract_state, iterator)
    logging.info("going on from step %d", step)
    # A global array, which every process makes from its own number.
    place = trainer.state_shardings.step
    number = jax.make_array_from_callback((), place, lambda _: np.asarray(step, np.int32))
    state = TrainState(step=number, params=restored.params, ema=restored.ema, opt_state=restored.opt_state)
    return state, restored.meta
  params = trainer.init_params(jax.random.key(seed))
  if init_from:
    params |= load_initial(init_from, trainer)
  return trainer.with_params(params), {}


def find_initial(path: str, trainer: Step) -> Params:
  """Shapes of another run's parameters, some of which this network has too.

  Raises:
    UserError: no run there, nothing in common, or a parameter of another shape.
  """
  # Shapes alone: what does not fit is found before gigabytes are read.
  saved = checkpoint.saved_params(path)
  common = saved.keys() & trainer.shapes.keys()
  if not common:
    raise UserError(f"init_from={path} has no parameter of this network; it holds {parts_of(saved)}")
  for name in sorted(common):
    if saved[name].shape != trainer.shapes[name].shape:
      raise UserError(
        f"init_from={path}: {name} has shape {saved[name].shape} there and {trainer.shapes[name].shape} in this"
        " config; use the same model section"
      )
  return saved


def load_initial(path: str, trainer: Step) -> Params:
  """Parameters of another run that this network has too; averaged ones where that run keeps them.

  Raises:
    UserError: as `find_initial`.
  """
  saved = find_initial(path, trainer)
  abstract = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    saved,
    sharding.shardings(saved, trainer.mesh, saved),
  )
  params = checkpoint.restore_params(path, abstract=abstract)
  loaded = {name: value for name, value in params.items() if name in trainer.shapes}
  logging.info("init_from %s: loaded %s", path, parts_of(loaded))
  logging.info("initialised: %s", parts_of(trainer.shapes.keys() - loaded.keys()) or "nothing")
  logging.info("ignored: %s", parts_of(saved.keys() - loaded.keys()) or "nothing")
  return loaded


def parts_of(paths: Iterable[str]) -> str:
  """`unet 686, autoencoder 250`: how many of these parameters each part has."""
  return ", ".join(f"{part} {n}" for part, n in sorted(Counter(path.split(".")[0] for path in paths).items()))
