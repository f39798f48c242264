"""Reads a run's checkpoints, whole to resume it, or its parameters alone to use it beside a run that still trains."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from orbax import checkpoint as ocp

from diffdis_jax.common import buckets, files, one_file, shipped, storage
from diffdis_jax.common.params import Params
from diffdis_jax.errors import Gone, UserError, may_pass, parse_json
from diffdis_jax.parallel import processes
from diffdis_jax.run import committed, digests
from diffdis_jax.structs import TrainState

STORED = ("params", "ema", "opt_state", "teacher", "frozen")  # of a TrainState; its step is the folder's name
_Read = TypeVar("_Read")
_Arrays = dict[str, jax.ShapeDtypeStruct]  # by dotted path, without a sharding


class Restored(NamedTuple):
  """A checkpoint in memory. The data iterator is restored in place."""

  state: TrainState
  meta: dict[str, Any]


def find(workdir: epath.PathLike, step: int | None = None) -> epath.Path:
  """The folder of a committed checkpoint, the newest one for None.

  Raises:
    UserError: there is none, or its save was interrupted.
  """
  folder = committed.folder(workdir)
  if step is None and (step := committed.latest_step(workdir)) is None:
    hint = shipped.meant(workdir)
    raise UserError(f"no checkpoint in {folder}; train first, or wait for the first save{hint}")
  if not committed.is_committed(folder / str(step)):
    there = f"committed there: {', '.join(map(str, committed.committed_steps(folder))) or 'none'}"
    # The user sees its folder there, and learns why it does not count.
    if (folder / str(step)).exists():
      raise UserError(f"checkpoint {step} in {folder} was never committed: it has no {committed.COMMIT_MARK}; {there}")
    raise UserError(f"no checkpoint {step} in {folder}; {there}")
  return folder / str(step)


class Chosen(NamedTuple):
  """A committed checkpoint, and whether its averaged weights are taken."""

  step: int
  ema: bool


def choose(workdir: epath.PathLike, step: int | None, *, ema: bool) -> Chosen:
  """What `restore_params` takes for these wishes; the same on every process, each of which makes the call.

  Raises:
    UserError: there is no such checkpoint, or its save was interrupted.
  """
  if (file := one_file.at(workdir)) is not None:
    there = one_file.check(file, step, ema=ema)
    return Chosen(there.step, there.ema)
  saved = find(workdir, _same_for_all(workdir, step))
  return Chosen(int(saved.name), ema and (saved / "ema").exists())


def _same_for_all(workdir: epath.PathLike, step: int | None) -> int | None:
  """The step to read, of several processes the one that the first finds: a run that still trains may save another
  between two looks, and each of them reads a part of the same one. Raises UserError: as `find`."""
  if jax.process_count() == 1:
    return step
  found = step or 0

  def look() -> None:
    nonlocal found
    found = int(find(workdir, step).name)

  processes.on_first(look)
  found = int(processes.from_first(np.int32(found)))
  _wait_until_shown(workdir, found)
  return found


def find_shown(workdir: epath.PathLike, step: int) -> epath.Path:
  """As `find`, of a step that process 0 has found."""
  _wait_until_shown(workdir, step)
  return find(workdir, step)


def _wait_until_shown(workdir: epath.PathLike, step: int) -> None:
  """A shared file system may show a checkpoint to one process later than to another."""
  if jax.process_count() > 1:
    processes.shows(lambda: committed.is_committed(committed.folder(workdir) / str(step)))


def read_state(path: epath.Path, abstract: TrainState, data_iterator: Any = None) -> Restored:
  """A whole checkpoint, as `checkpoint.Checkpointer.restore` says; `path` is its folder."""

  def read() -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    trees = {name: _read_tree(path / name, getattr(abstract, name)) for name in STORED}
    meta = _read(path / "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    return TrainState(**trees), meta, {} if data_iterator is None else _read_position(path / "data")

  state, meta, position = _checked(path, None, read)
  # Last: a checkpoint that does not fit the model, or is damaged, is refused before the iterator has moved. Then it
  # starts to read ahead, while the first step compiles.
  if data_iterator is not None:
    _guard(path / "data", lambda: data_iterator.set_state(position))
    data_iterator.start_prefetch()
  return Restored(state, meta)


def restore_params(
  workdir: epath.PathLike, *, step: int | None = None, ema: bool = True, abstract: Params | None = None
) -> Params:
  """Parameters of a run, for use without its optimizer. Every process makes the call.

  Args:
    workdir: folder of the run.
    step: which checkpoint; None takes the newest.
    ema: whether averaged parameters, where the run keeps them, replace the raw ones.
    abstract: ShapeDtypeStructs with shardings; without it everything lands on the first device.

  Raises:
    UserError: no such checkpoint, or one that is damaged or does not fit `abstract`.
  """
  if (file := one_file.at(workdir)) is not None:
    one_file.check(file, step, ema=ema)
    return _placed(file, one_file.read_params(file), abstract)
  path = find(workdir, _same_for_all(workdir, step))
  if not ema:
    return _checked(path, ("params",), lambda: _read_tree(path / "params", abstract))
  # Averages too where there are none now: their folder may be what is missing.
  return _checked(path, ("params", "ema"), lambda: _read_averaged(path, abstract))


def _placed(file: pathlib.Path, params: Params, abstract: Params | None) -> Params:
  """The arrays of a run in one file, where `abstract` has them, or on the first device."""
  abstract = _arrays(params) if abstract is None else abstract
  _check_fits(file, _arrays(params), abstract)
  return {name: jax.device_put(params[name], like.sharding) for name, like in abstract.items()}


def _read_averaged(path: epath.Path, abstract: Params | None) -> Params:
  """Parameters, averaged where the run keeps that."""
  if not (path / "ema").exists():
    return _read_tree(path / "params", abstract)
  # Averages are kept of what is trained alone. The rest, such as a frozen autoencoder, is the raw parameters'; the raw
  # ones that averages replace are not read at all, which is half of the bytes.
  averaged = _saved(path / "ema").keys()
  raw = _read_tree(path / "params", abstract, without=averaged)
  return raw | _read_tree(path / "ema", abstract and {name: abstract[name] for name in averaged if name in abstract})


def saved_params(workdir: epath.PathLike) -> Params:
  """Shapes and dtypes of a run's newest parameters, as jax.ShapeDtypeStruct.

  Raises:
    UserError: there is no checkpoint.
  """
  if (file := one_file.at(workdir)) is not None:
    return dict(_arrays(one_file.read_params(file)))
  return dict(_saved(find(workdir) / "params"))


def initialised(workdir: epath.PathLike) -> set[str]:
  """The parameters that import_weights initialised at random; none of another command's run.

  Raises:
    UserError: import.json cannot be read, or does not say them.
  """
  if (packed := one_file.at(workdir)) is not None:
    return {*one_file.read_record(packed).initialised}
  file = buckets.path(workdir) / "import.json"
  if not file.exists():
    return set()
  try:
    return {*files.read_json(file)["initialised"]}
  except (UserError, KeyError, TypeError) as error:
    raise UserError(f"{file} does not say what was initialised; it should be as import_weights wrote it") from error


def _read_position(path: epath.Path) -> dict[str, Any]:
  """The data iterator's position."""

  # Each process has saved it, and it is the same for all. So the first file serves any number of them, and a run
  # resumes on another number of hosts; Grain's own handler would want one file for each.
  def read() -> dict[str, Any]:
    files = sorted(path.glob("process_*-of-*.json"))
    if not files:
      raise ValueError("it has no process_*.json")
    return parse_json(files[0].read_bytes(), files[0].name)

  return _guard(path, read)


def _read_tree(path: epath.Path, abstract: Any | None, *, without: Collection[str] = ()) -> Any:
  """One item of a checkpoint. An item without arrays is not stored, so that `abstract` itself is its value.

  Arrays of a flat dict whose names are in `without` are left out, unread.
  """
  if abstract is not None and not jax.tree.leaves(abstract):
    return abstract
  # Shapes first: they are a few kilobytes, and say in one line what does not fit before gigabytes are read.
  saved = _saved(path)
  if abstract is None:
    abstract = saved
  _check_fits(path, saved, abstract)
  # Without a sharding Orbax takes the one that was saved, whose devices this machine may not have.
  one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one_device), abstract)
  # After the check, which looks at all arrays: one that is left out has to fit as well.
  target = {name: x for name, x in target.items() if name not in without} if without else target
  if not jax.tree.leaves(target):
    return target
  restore_args = ocp.checkpoint_utils.construct_restore_args(target)
  args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=bool(without))
  return _read(path, ocp.PyTreeCheckpointHandler(), args)


def _saved(path: epath.Path) -> _Arrays:
  return _arrays(_guard(path, lambda: ocp.StandardCheckpointHandler().metadata(path).tree))


def _arrays(tree: Any) -> _Arrays:
  leaves = jax.tree.leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  return {name(key): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for key, x in leaves}


def _check_fits(path: epath.Path | pathlib.Path, saved: _Arrays, abstract: Any) -> None:
  wanted = _arrays(abstract)
  differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
  if differing:
    name = differing[0]
    raise UserError(
      f"checkpoint {path} does not fit this model in {len(differing)} arrays; the first, {name}, is "
      f"{_describe(saved.get(name))} there and {_describe(wanted.get(name))} here; take the config it was saved with"
    )


def _describe(array: jax.ShapeDtypeStruct | None) -> str:
  return "absent" if array is None else f"{array.dtype}{list(array.shape)}"


def _read(path: epath.Path, handler: Any, args: Any) -> Any:
  # Each process by itself: else all of them meet at the end of each item, and one that reads again, since its storage
  # was away, would come there more often than the others.
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})

  def restore() -> Any:
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
      return checkpointer.restore(path, args=args)

  return _guard(path, restore)


def _checked(path: epath.Path, items: Collection[str] | None, read: Callable[[], _Read]) -> _Read:
  """Calls `read`, and checks the digests of these items of the checkpoint meanwhile; of all of them for None.

  Several processes share the check of the large files, and raise the same error. Storage that is away is tried again.

  Raises:
    UserError: a file is not as it was saved, or what `read` raises.
  """
  return storage.patiently(lambda: _checked_once(path, items, read), f"{path}")


def _checked_once(path: epath.Path, items: Collection[str] | None, read: Callable[[], _Read]) -> _Read:
  count, index = jax.process_count(), jax.process_index()
  with digests.checking(path, items, share=slice(index, None, count)) as check:
    if check.early is not None:
      raise _damaged(path, check.early)
    try:
      found = read()
    except Exception as error:
      if may_pass(error):
        raise
      if not path.parent.is_dir():  # of a disk that is away, which had it a moment ago
        raise Gone(f"{path.parent} is not there") from error
      # The digests name the file, and separate damage from a model that does not fit. The other processes may be held
      # up in the reading: this one looks by itself.
      damage = check.late() if count == 1 else digests.damage(path)
      known = error if damage is None else _damaged(path, damage)
      if isinstance(known, UserError):
        processes.first_message(str(known))  # the others wait there, if what is damaged was this one's to read
      if damage is None:
        raise
      raise known from error
    damage = check.late()
    message = "" if damage is None else str(_damaged(path, damage))
  if message := processes.first_message(message):
    raise UserError(message)
  return found


def check_metrics(checkpoints: epath.Path) -> None:
  """Raises UserError: what a checkpoint was measured at, by which the best ones are kept, is not as it was saved."""
  steps = committed.committed_steps(checkpoints)
  look = lambda step: digests.damage(checkpoints / str(step), ("metrics",))
  for step, damage in zip(steps, committed.of_each(look, steps), strict=True):
    if damage is not None:
      what = f"its metrics: {damage.file} {damage.what}; move its folder elsewhere"
      raise UserError(f"checkpoint {checkpoints / str(step)} cannot be read: {what}")


def _damaged(path: epath.Path, damage: digests.Damage) -> UserError:
  item, otherwise = damage.file.partition("/")[0], _OTHERWISE
  whole = digests.newest_whole(path.parent, before=int(path.name))
  if whole is not None:
    otherwise = (
      f"take --step={whole}, the newest whole one before it, or move the folders of later ones elsewhere to resume from"
      " that one"
    )
  return UserError(f"checkpoint {path} cannot be read: its {item}: {damage.file} {damage.what}; {otherwise}")


# Each message says what to do, since the run cannot resume by itself: it must not fall back to an older step unasked.
_OTHERWISE = "take another step, or move its folder elsewhere to resume from the one before"
# What readers raise for bytes that are not those that were written; NotImplementedError is of Orbax's `_sharding`.
_OF_DAMAGE = (UserError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, OSError)


def _guard(path: epath.Path, read: Callable[[], Any]) -> Any:
  """Calls `read`; a checkpoint that lacks files or bytes is bad input, and not a bug."""
  if not path.exists():
    raise UserError(f"checkpoint {path.parent} is incomplete: it has no {path.name}; {_OTHERWISE}")
  try:
    return read()
  except Exception as error:
    # Orbax raises a bare Exception for an array, with what was wrong as its cause.
    reason = error.__cause__ if type(error) is Exception else error
    if not isinstance(reason, _OF_DAMAGE) or may_pass(reason):
      raise
    text = " ".join(str(reason).split())[:200]
    raise UserError(f"checkpoint {path.parent} cannot be read: its {path.name}: {text}; {_OTHERWISE}") from error
