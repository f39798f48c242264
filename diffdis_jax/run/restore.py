"""Read a run's checkpoints, whole to resume it, or only the parameters, also while the run still trains.

Digests are checked before reading, since Orbax does not check values.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from orbax import checkpoint as ocp

from diffdis_jax.common import buckets, files, one_file, storage
from diffdis_jax.common.params import Params
from diffdis_jax.errors import Gone, UserError
from diffdis_jax.parallel import processes
from diffdis_jax.run import digests, workdir
from diffdis_jax.structs import TrainState

STORED = ("params", "ema", "opt_state", "teacher")  # the stored fields of a TrainState; the folder's name is its step
_Read = TypeVar("_Read")
_Arrays = dict[str, jax.ShapeDtypeStruct]  # shapes by dotted path, without shardings


class Restored(NamedTuple):
  """A checkpoint in memory. The data iterator has been restored in place."""

  state: TrainState
  meta: dict[str, Any]


class Chosen(NamedTuple):
  """The step of a committed checkpoint, and whether its averaged weights are used."""

  step: int
  ema: bool


def find(run: epath.PathLike, step: int | None = None) -> epath.Path:
  """Return the folder of a committed checkpoint, the newest for None. Raises UserError: there is none, or its save was
  interrupted."""
  folder = workdir.checkpoints(run)
  if step is None and (step := workdir.latest_step(run)) is None:
    raise UserError(f"no checkpoint in {folder}; train first, or wait for the first save{one_file.meant(run)}")
  path = folder / str(step)
  if not workdir.is_committed(path):
    # If its folder exists, tell the user why it does not count.
    why = f": it was never committed, since it has no {digests.COMMIT_MARK}" if path.exists() else ""
    there = ", ".join(map(str, workdir.committed_steps(folder))) or "none"
    raise UserError(f"no checkpoint {step} in {folder}{why}; committed there: {there}")
  return path


def find_on_all(run: epath.PathLike, step: int | None) -> epath.Path:
  """Return the checkpoint that the first process finds. All processes call this. Raises UserError as `find`.

  Processes might differ: a run that trains may save meanwhile, and a shared disk may show files to some later.
  """
  steps = [0]
  processes.on_first(lambda: steps.insert(0, int(_patiently(lambda: find(run, step), run).name)))
  path = workdir.checkpoints(run) / str(int(processes.from_first(np.int32(steps[0]))))
  processes.shows(lambda: workdir.is_committed(path))
  return path


def choose(run: epath.PathLike, step: int | None, *, ema: bool) -> Chosen:
  """Return what `restore_params` would read for these arguments. All processes call this, with the same result. Raises
  UserError as `find`."""
  if (file := one_file.at(run)) is not None:
    record = one_file.check(file, step, ema=ema)
    return Chosen(record.step, record.ema)
  path = find_on_all(run, step)
  return Chosen(int(path.name), ema and (path / "ema").exists())


def read_state(run: epath.PathLike, step: int, abstract: TrainState, data_iterator: Any = None) -> Restored:
  """Read a whole checkpoint onto the devices of `abstract`, and set the data iterator to its position.

  Args:
    run: its folder.
    step: a committed step.
    abstract: ShapeDtypeStructs with shardings, which may differ from those of the run that saved.
    data_iterator: a Grain iterator that was built like the saved one.

  Raises:
    UserError: the checkpoint is missing, damaged, of another run, or does not fit `abstract`.
  """

  def read(path: epath.Path) -> tuple[TrainState, dict[str, Any], list[Any]]:
    state = TrainState(**{name: _read_tree(path / name, getattr(abstract, name)) for name in STORED})
    meta = json.loads((path / "meta" / "metadata").read_bytes())
    # All processes have saved the same position of the iterator, so that the first file serves any number of
    # processes; Grain's own handler would need one file for each.
    positions = sorted((path / "data").glob("process_*-of-*.json")) if data_iterator is not None else []
    return state, meta, [json.loads(file.read_bytes()) for file in positions[:1]]

  path = find_on_all(run, step)
  state, meta, position = _checked(path, None, read)
  # The iterator comes last, so that a wrong checkpoint does not move it. It starts to read ahead while the first step
  # compiles.
  if data_iterator is not None:
    if not position:
      raise UserError(f"checkpoint {path} has no position in the data, so that no run can resume from it")
    data_iterator.set_state(position[0])
    data_iterator.start_prefetch()
  return Restored(state, meta)


def restore_params(
  run: epath.PathLike, *, step: int | None = None, ema: bool = True, abstract: Params | None = None
) -> Params:
  """Read the parameters of a run, for use without its optimizer. All processes call this.

  Args:
    run: its folder, or a run in one file.
    step: the checkpoint's step; None takes the newest.
    ema: whether averaged parameters, if the run has them, replace the raw ones.
    abstract: ShapeDtypeStructs with shardings; without it, all arrays are put on the first device.

  Raises:
    UserError: the checkpoint is missing, damaged, or does not fit `abstract`.
  """
  if (file := one_file.at(run)) is not None:
    one_file.check(file, step, ema=ema)
    params = one_file.read_params(file)
    _check_fits(file, _arrays(params), wanted := _arrays(params) if abstract is None else abstract)
    return {name: jax.device_put(params[name], like.sharding) for name, like in wanted.items()}

  def read(path: epath.Path) -> Params:
    # Only trained parameters have averages. The others, such as a frozen autoencoder's, are raw. Raw parameters that
    # averages replace are not read, which saves half of the bytes.
    averaged = _saved(path / "ema").keys() if ema else set()
    raw = _read_tree(path / "params", abstract, without=averaged)
    if not averaged:
      return raw
    return raw | _read_tree(path / "ema", abstract and {name: abstract[name] for name in averaged if name in abstract})

  # Check the averages even if there are none: their folder may be missing.
  return _checked(find_on_all(run, step), ("params", "ema") if ema else ("params",), read)


def saved_params(run: epath.PathLike) -> Params:
  """Return the shapes and dtypes of a run's newest parameters. Raises UserError: there are none, or damaged ones."""
  if (file := one_file.at(run)) is not None:
    return dict(_arrays(one_file.read_params(file)))
  return dict(_checked(find_on_all(run, None), ("params",), lambda path: _saved(path / "params")))


def initialised(run: epath.PathLike) -> set[str]:
  """Return the names of the parameters that import_weights initialised at random; other runs have none. Raises
  UserError: import.json is damaged."""
  if (packed := one_file.at(run)) is not None:
    return {*one_file.read_record(packed).initialised}
  file = buckets.path(run) / "import.json"
  content = files.read_json(file) if file.exists() else {"initialised": []}
  if not isinstance(content, dict) or "initialised" not in content:
    raise UserError(f"{file} does not say what was initialised; it should be as import_weights wrote it")
  return {*content["initialised"]}


def _read_tree(path: epath.Path, abstract: Any | None, *, without: Collection[str] = ()) -> Any:
  """Read an item of a checkpoint. An item without arrays is not stored, so that its value is `abstract` itself.

  In a flat dict, the arrays named in `without` are not read.
  """
  if abstract is not None and not jax.tree.leaves(abstract):
    return abstract
  # Read the shapes first: they are a few kilobytes, and a wrong one is reported before gigabytes are read.
  saved = _saved(path)
  abstract = saved if abstract is None else abstract
  _check_fits(path, saved, abstract)
  # Without a sharding, Orbax would use the saved one, whose devices this machine may lack.
  one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one_device), abstract)
  # Leave arrays out after the check, since these have to fit, too.
  target = {name: x for name, x in target.items() if name not in without} if without else target
  if not jax.tree.leaves(target):
    return target
  # Each process reads independently. Otherwise all would wait for each other after each item, and a process that reads
  # again, since its storage was unreachable, would come there more often than the others.
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
  wanted = ocp.checkpoint_utils.construct_restore_args(target)
  args = ocp.args.PyTreeRestore(target, restore_args=wanted, partial_restore=bool(without))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
    return checkpointer.restore(path, args=args)


def _saved(path: epath.Path) -> _Arrays:
  """Return the shapes of an item's arrays; none if it is not stored."""
  return _arrays(ocp.StandardCheckpointHandler().metadata(path).tree) if path.exists() else {}


def _arrays(tree: Any) -> _Arrays:
  name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  return {name(key): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for key, x in jax.tree.leaves_with_path(tree)}


def _check_fits(path: epath.Path | pathlib.Path, saved: _Arrays, abstract: Any) -> None:
  wanted = _arrays(abstract)
  differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
  if differing:
    first = [arrays.get(differing[0]) for arrays in (saved, wanted)]
    there, here = (f"{array.dtype}{list(array.shape)}" if array else "absent" for array in first)
    raise UserError(
      f"checkpoint {path} does not fit this model in {len(differing)} arrays; the first, {differing[0]}, is {there}"
      f" there and {here} here; take the config it was saved with"
    )


def _checked(path: epath.Path, items: Collection[str] | None, read: Callable[[epath.Path], _Read]) -> _Read:
  """Check the digests of these items of a checkpoint, or of all for None, and then call `read` with its folder.

  The first process checks for all, and all raise the same error. If the storage is unreachable, it is tried again.

  Raises:
    UserError: a file is damaged, or `read` raises it.
    Away: the storage stayed unreachable, or its answers were damaged each time.
  """

  def look() -> str:
    run = workdir.run_digest(path.parent.parent)
    damage = digests.damage_of_step(path, run, items)
    if damage is None:
      return ""
    whole = workdir.newest_whole(path.parent, run, before=int(path.name))
    otherwise = "take another step, or move its folder elsewhere to resume from the one before"
    if whole is not None:
      otherwise = f"take --step={whole}, the newest whole one before it, or move the folders of later ones elsewhere"
    return f"checkpoint {path} cannot be read: {damage.file} {damage.what}; {otherwise}"

  if message := processes.first_message(_patiently(look, path) if processes.is_first() else ""):
    raise UserError(message)
  return _patiently(lambda: read(path), path)


def _patiently(read: Callable[[], _Read], path: epath.PathLike) -> _Read:
  """Call `read` until it succeeds, if the storage is unreachable or a bucket's answer arrives damaged."""

  def look() -> _Read:
    try:
      return read()
    except (ValueError, KeyError, TypeError, AssertionError) as error:
      if not buckets.is_url(path):
        raise
      raise Gone(f"an answer arrived damaged: {str(error)[:80]}") from error

  return storage.patiently(look, f"{path}")
