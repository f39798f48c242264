"""Reads a run's checkpoints: whole, to resume it, or its parameters alone, also beside a run that still trains.

Digests are checked before anything is read, since Orbax checks no values.
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

STORED = ("params", "ema", "opt_state", "teacher")  # of a TrainState; its step is the folder's name
_Read = TypeVar("_Read")
_Arrays = dict[str, jax.ShapeDtypeStruct]  # by dotted path, without a sharding


class Restored(NamedTuple):
  """A checkpoint in memory. The data iterator is restored in place."""

  state: TrainState
  meta: dict[str, Any]


class Chosen(NamedTuple):
  """A committed checkpoint, and whether its averaged weights are taken."""

  step: int
  ema: bool


def find(run: epath.PathLike, step: int | None = None) -> epath.Path:
  """Find the folder of a committed checkpoint, the newest one for None. Raises UserError: there is none, or its save
  was interrupted."""
  folder = workdir.checkpoints(run)
  if step is None and (step := workdir.latest_step(run)) is None:
    raise UserError(f"no checkpoint in {folder}; train first, or wait for the first save{one_file.meant(run)}")
  path = folder / str(step)
  if not workdir.is_committed(path):
    # The user sees its folder there, and learns why it does not count.
    why = f": it was never committed, since it has no {digests.COMMIT_MARK}" if path.exists() else ""
    there = ", ".join(map(str, workdir.committed_steps(folder))) or "none"
    raise UserError(f"no checkpoint {step} in {folder}{why}; committed there: {there}")
  return path


def find_on_all(run: epath.PathLike, step: int | None) -> epath.Path:
  """Find the checkpoint that the first process finds. Every process makes the call. Raises UserError as `find`.

  A run that still trains may save another one between two looks, and a shared disk may show it to some of them later.
  """
  steps = [0]
  processes.on_first(lambda: steps.insert(0, int(_patiently(lambda: find(run, step), run).name)))
  path = workdir.checkpoints(run) / str(int(processes.from_first(np.int32(steps[0]))))
  processes.shows(lambda: workdir.is_committed(path))
  return path


def choose(run: epath.PathLike, step: int | None, *, ema: bool) -> Chosen:
  """Choose what `restore_params` reads for these wishes. Every process makes the call, and gets the same. Raises
  UserError as `find`."""
  if (file := one_file.at(run)) is not None:
    record = one_file.check(file, step, ema=ema)
    return Chosen(record.step, record.ema)
  path = find_on_all(run, step)
  return Chosen(int(path.name), ema and (path / "ema").exists())


def read_state(run: epath.PathLike, step: int, abstract: TrainState, data_iterator: Any = None) -> Restored:
  """Read a whole checkpoint onto the devices that `abstract` asks for, and set the data iterator to it.

  Args:
    run: its folder.
    step: a committed step.
    abstract: ShapeDtypeStructs with shardings; these need not be those of the run that saved.
    data_iterator: a Grain iterator built as the saved one was.

  Raises:
    UserError: no such checkpoint, or one that is damaged, of another run, or does not fit `abstract`.
  """

  def read(path: epath.Path) -> tuple[TrainState, dict[str, Any], list[Any]]:
    state = TrainState(**{name: _read_tree(path / name, getattr(abstract, name)) for name in STORED})
    meta = json.loads((path / "meta" / "metadata").read_bytes())
    # Each process has saved the iterator's position, and it is the same for all. So the first file serves any number
    # of processes; Grain's own handler would want one file for each.
    positions = sorted((path / "data").glob("process_*-of-*.json")) if data_iterator is not None else []
    return state, meta, [json.loads(file.read_bytes()) for file in positions[:1]]

  path = find_on_all(run, step)
  state, meta, position = _checked(path, None, read)
  # Last: a checkpoint that does not fit the model, or is damaged, is refused before the iterator has moved. Then it
  # starts to read ahead, while the first step compiles.
  if data_iterator is not None:
    if not position:
      raise UserError(f"checkpoint {path} has no position in the data, so that no run can resume from it")
    data_iterator.set_state(position[0])
    data_iterator.start_prefetch()
  return Restored(state, meta)


def restore_params(
  run: epath.PathLike, *, step: int | None = None, ema: bool = True, abstract: Params | None = None
) -> Params:
  """Read the parameters of a run, for use without its optimizer. Every process makes the call.

  Args:
    run: its folder, or a run in one file.
    step: of the checkpoint; None takes the newest.
    ema: whether averaged parameters, where the run keeps them, replace the raw ones.
    abstract: ShapeDtypeStructs with shardings; without it everything lands on the first device.

  Raises:
    UserError: no such checkpoint, or one that is damaged or does not fit `abstract`.
  """
  if (file := one_file.at(run)) is not None:
    one_file.check(file, step, ema=ema)
    params = one_file.read_params(file)
    _check_fits(file, _arrays(params), wanted := _arrays(params) if abstract is None else abstract)
    return {name: jax.device_put(params[name], like.sharding) for name, like in wanted.items()}

  def read(path: epath.Path) -> Params:
    # Averages are kept of what is trained alone. The rest, such as a frozen autoencoder, is the raw parameters'; the
    # raw ones that averages replace are not read at all, which is half of the bytes.
    averaged = _saved(path / "ema").keys() if ema else set()
    raw = _read_tree(path / "params", abstract, without=averaged)
    if not averaged:
      return raw
    return raw | _read_tree(path / "ema", abstract and {name: abstract[name] for name in averaged if name in abstract})

  # Averages too where there are none now: their folder may be what is missing.
  return _checked(find_on_all(run, step), ("params", "ema") if ema else ("params",), read)


def saved_params(run: epath.PathLike) -> Params:
  """Read shapes and dtypes of a run's newest parameters. Raises UserError: there are none, or they are damaged."""
  if (file := one_file.at(run)) is not None:
    return dict(_arrays(one_file.read_params(file)))
  return dict(_checked(find_on_all(run, None), ("params",), lambda path: _saved(path / "params")))


def initialised(run: epath.PathLike) -> set[str]:
  """Read the names of the parameters that import_weights initialised at random; none of another command's run. Raises
  UserError: import.json is damaged."""
  if (packed := one_file.at(run)) is not None:
    return {*one_file.read_record(packed).initialised}
  file = buckets.path(run) / "import.json"
  content = files.read_json(file) if file.exists() else {"initialised": []}
  if not isinstance(content, dict) or "initialised" not in content:
    raise UserError(f"{file} does not say what was initialised; it should be as import_weights wrote it")
  return {*content["initialised"]}


def _read_tree(path: epath.Path, abstract: Any | None, *, without: Collection[str] = ()) -> Any:
  """Read one item of a checkpoint. An item without arrays is not stored, so that `abstract` itself is its value.

  Arrays of a flat dict whose names are in `without` are left out, unread.
  """
  if abstract is not None and not jax.tree.leaves(abstract):
    return abstract
  # Shapes first: they are a few kilobytes, and say in one line what does not fit before gigabytes are read.
  saved = _saved(path)
  abstract = saved if abstract is None else abstract
  _check_fits(path, saved, abstract)
  # Without a sharding Orbax takes the one that was saved, whose devices this machine may not have.
  one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one_device), abstract)
  # After the check, which looks at all arrays: one that is left out has to fit as well.
  target = {name: x for name, x in target.items() if name not in without} if without else target
  if not jax.tree.leaves(target):
    return target
  # Each process by itself: else all of them meet at the end of each item, and one that reads again, since its storage
  # was away, would come there more often than the others.
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
  wanted = ocp.checkpoint_utils.construct_restore_args(target)
  args = ocp.args.PyTreeRestore(target, restore_args=wanted, partial_restore=bool(without))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
    return checkpointer.restore(path, args=args)


def _saved(path: epath.Path) -> _Arrays:
  """Read the shapes of an item's arrays; none where it is not stored."""
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
  """Check the digests of these items of a checkpoint, of all for None, and then call `read` with its folder.

  The first process checks for all, and all raise the same error. Storage that is away is tried again.

  Raises:
    UserError: a file is not as it was saved, or what `read` raises.
    Away: the storage did not come back, or what it sent was damaged each time.
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
  """Call `read` until storage that is away is back; an answer of a bucket may also arrive damaged."""

  def look() -> _Read:
    try:
      return read()
    except (ValueError, KeyError, TypeError, AssertionError) as error:
      if not buckets.is_url(path):
        raise
      raise Gone(f"an answer arrived damaged: {str(error)[:80]}") from error

  return storage.patiently(look, f"{path}")
