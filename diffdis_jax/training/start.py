"""Make the state with which a run starts: from its last checkpoint, another run's parameters, or initial ones.

Initial parameters have to be trained. Frozen ones must come from another run: otherwise the run would train on random
latents or random text, while its loss looks normal.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import grain
import jax
import numpy as np
from absl import logging
from clu import parameter_overview

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, files
from diffdis_jax.common.params import Params
from diffdis_jax.config.model import Model
from diffdis_jax.config.run import Run
from diffdis_jax.data import encoders
from diffdis_jax.data.build import latent_facts, open_loader
from diffdis_jax.errors import UserError
from diffdis_jax.method.network import HEAD_PREFIX, Network
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import checkpoint, lock, restore, workdir
from diffdis_jax.run.restore import Restored
from diffdis_jax.training import anchors, optim, run_info
from diffdis_jax.training.step import Trainer

# Fields of a part's section that change its function but not the shapes of its parameters.
UNSEEN = ("activation", "num_heads", "groups")


def open_batches(trainer: Trainer) -> grain.DatasetIterator:
  """Open the data of a run. Each process reads its own rows."""
  run, network = trainer.run, trainer.network
  return open_loader(run, rows=sharding.local_rows(trainer.mesh, run.batch_size), latent_shape=latent_shape(network))


def latent_shape(network: Network) -> tuple[int, int, int] | None:
  """Return the shape of stored latents, or None if the training needs images, as that of autoencoders, CLIP or with
  labels."""
  return None if network.task.needs_images else network.latent_shape


def open_workdir(path: str, trainer: Trainer, stack: contextlib.ExitStack) -> int | None:
  """Create or check the workdir of the run, and lock it until `stack` closes. Return the run's number of steps before
  it was made longer, or None."""
  # Process 0 decides whether the run is new. A new run with a wrong `init_from` creates no workdir.
  if bool(processes.from_first(np.uint8(workdir.latest_step(path) is None))):
    find_initial(trainer.run.init_from, trainer)
  fields, moved = trainer.run.to_dict(), run_info.moved(trainer.run, path)
  # Lock before writing: two runs in one workdir would each drop the other's lines and checkpoints.
  processes.on_first(lambda: stack.enter_context(lock.Lock(path)))
  before = workdir.lengthened(path, fields)
  workdir.open_for_training(path, fields, is_writer=processes.is_first(), moved=moved)
  if processes.is_first():
    # Without statistics, since there are only shapes yet.
    table = parameter_overview.get_parameter_overview(trainer.shapes, include_stats=False) + "\n"
    files.write_whole(buckets.path(path) / "parameters.txt", table.encode())
  check_shared(path)
  return before


def check_shared(path: str) -> None:
  """Raise UserError on every process if one of them does not see the config.json that process 0 has written."""
  sees = processes.shows((buckets.path(path) / "config.json").exists)
  if blind := processes.first_message("" if sees else f"host {jax.process_index()}"):
    raise UserError(
      f"--workdir={path} is not shared: {blind} does not see a file that host 0 wrote there; give a folder that all"
      " hosts see, such as gs://BUCKET/RUN or one on NFS"
    )


def restore_or_init(
  trainer: Trainer,
  checkpoints: checkpoint.Checkpointer,
  data: grain.DatasetIterator,
  choose: Callable[[Params], Params] | None = None,
) -> Restored:
  """Return the state and meta of the last checkpoint, and set the data to the next batch; or return the state of step
  0, without meta.

  Args:
    choose: a function that computes some parameters of step 0 from the others, or None.
  """
  if (step := checkpoints.latest_step()) is not None:
    restored = restore.read_state(checkpoints.run, step, trainer.abstract_state, data)
    logging.info("resuming from step %d", step)
    restored = restored._replace(state=trainer.numbered(restored.state, step=step))
  else:
    run = trainer.run
    loaded = load_initial(run.init_from, trainer)  # first, so that errors are found before anything is compiled
    # Initialise also the loaded ones, so that an initial value does not depend on which others are loaded.
    params = trainer.init_params(jax.random.key(run.seed)) | loaded
    restored = Restored(trainer.with_params(params | choose(params) if choose else params), {})
  # Done here, since the digests are of the parameters.
  model = trainer.run.model
  if (stored := latent_facts(trainer.run.data)) and isinstance(model, Model):  # CLIP has no latents
    encoders.check_stored(stored, restored.state.params, model)
  return restored


def find_initial(path: str, trainer: Trainer) -> set[str]:
  """Return the names of the parameters that a new run takes from the run in `path`, those in both; none for "".

  From an import, only those of its source are taken: the others are initialised again by this run's seed. Only shapes
  are read, so that errors are found before gigabytes are read.

  Raises:
    UserError: there is no run, it has another objective than required, no common parameter, a parameter of another
      shape or a part with another function, or a frozen parameter would stay random.
  """
  task = trainer.run.task
  if task.starts_from:
    _check_earlier(path, trainer.run)
  names = _names_in_common(path, trainer) if path else set()
  if task.starts_from:
    wanted = {name for name in trainer.shapes if not name.startswith(HEAD_PREFIX)}
    if missing := sorted(wanted - names):
      raise UserError(
        f"init_from={path} lacks an image or a text side: it has no {missing[0]}, nor {len(missing) - 1} more of"
        f" {parts_of(missing)}; take a run that was trained for discrimination or contrastive"
      )
  _check_frozen(path, trainer, names | {anchors.ANCHORS})  # the anchors are chosen
  return names


def _check_earlier(path: str, run: Run) -> None:
  """Raise UserError unless the run in `path` has the objective from which this one starts, and is finished."""
  name, row = run.objectives[0], run.task
  if not path:
    raise UserError(
      f"init_from is empty; objective {name} starts from {row.starts_from}: give --config.init_from=WORKDIR"
    )
  earlier = run_config.load(path)
  if not row.follows:  # stage 1 may start from an unfinished run
    return
  if row.follows not in earlier.objectives:
    raise UserError(
      f"init_from={path} was trained for {', '.join(earlier.objectives)}, and {name} starts from {row.follows}: train"
      " that from it first (configs/places_lt.py:stage=1), and take that run"
    )
  if (step := restore.choose(path, None, ema=True).step) != earlier.num_steps:
    raise UserError(
      f"init_from={path} is {row.follows} at step {step} of {earlier.num_steps}; train it to its end first"
    )


def _names_in_common(path: str, trainer: Trainer) -> set[str]:
  saved = restore.saved_params(path)
  # The latents' shift and scale are no tensors of a source, but come from its config.
  random = {name for name in restore.initialised(path) if not re.search(optim.STATISTICS, name)}
  common = saved.keys() & trainer.shapes.keys() - random
  if not common:
    raise UserError(f"init_from={path} has no parameter of this network; it holds {parts_of(saved)}")
  for name in sorted(common):  # sorted, so that the message is always the same
    if saved[name].shape != trainer.shapes[name].shape:
      raise UserError(
        f"init_from={path}: {name} has shape {saved[name].shape} there and {trainer.shapes[name].shape} in this"
        " config; use the same model section"
      )
  _check_unseen(path, trainer, common)
  return common


def _check_unseen(path: str, trainer: Trainer, names: Collection[str]) -> None:
  """Raise UserError if a part was trained with other values of UNSEEN, with which its weights are useless here."""
  there, here = run_config.read_fields(path)["model"], trainer.run.to_dict()["model"]
  flags = [
    f"--config.model.{part}.{field}={there[part][field]}"
    for part in sorted({name.split(".")[0] for name in names} & here.keys() & there.keys())
    for field in UNSEEN
    if field in here[part] and there[part].get(field, here[part][field]) != here[part][field]
  ]
  if flags:
    raise UserError(
      f"init_from={path} was trained with other fields of model than this config has, by which its weights compute"
      f" something else: give {' '.join(flags)}"
    )


def _check_frozen(path: str, trainer: Trainer, loaded: Collection[str]) -> None:
  """Raise UserError for frozen parameters that are not loaded and not named in optim.allow_uninitialized."""
  allowed = [trainer.run.optim.allow_uninitialized]
  # The run of an autoencoder measures its statistics; in other runs they are frozen like its weights.
  if trainer.run.task.network == "autoencoder":
    allowed.append(optim.STATISTICS)
  left = [
    name
    for name, group in trainer.groups.items()
    if group == optim.FROZEN and name not in loaded and not any(re.search(pattern, name) for pattern in allowed)
  ]
  if left:
    lacking = f"that init_from={path} does not have" if path else "that nothing was loaded for"
    raise UserError(
      f"optim.groups freezes {len(left)} parameters ({parts_of(left)}) {lacking}, the first {left[0]}; load them"
      " (--config.init_from=WORKDIR of import_weights or of an autoencoder's run), train them (optim.groups), or name"
      " them in optim.allow_uninitialized"
    )


def load_initial(path: str, trainer: Trainer) -> Params:
  """Read the parameters of `find_initial`, averaged ones if the other run has them; none for "".

  Raises:
    UserError: as `find_initial`.
  """
  names = find_initial(path, trainer)
  if not names:
    return {}
  saved = restore.saved_params(path)
  # Read them sharded for this mesh, so that no device ever holds all of them.
  abstract = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    saved,
    sharding.shardings(saved, trainer.mesh, saved),
  )
  params = restore.restore_params(path, abstract=abstract)
  logging.info("init_from %s: loaded %s", path, parts_of(names))
  logging.info("initialised: %s", parts_of(trainer.shapes.keys() - names) or "nothing")
  logging.info("ignored: %s", parts_of(saved.keys() - names) or "nothing")
  return {name: params[name] for name in names}


def parts_of(paths: Iterable[str]) -> str:
  """Count these parameters by part of the network, such as `unet 686, autoencoder 250`."""
  return ", ".join(f"{part} {n}" for part, n in sorted(Counter(path.split(".")[0] for path in paths).items()))
