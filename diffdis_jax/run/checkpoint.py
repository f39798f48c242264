"""Orbax checkpoints of a run: `<workdir>/checkpoints/<step>/{params,ema,opt_state,teacher,data,meta}`.

A checkpoint counts once it holds Orbax's commit mark, its last file to be written. Training saves and resumes through
`Checkpointer`; `restore_params` only reads, so it may be used beside a run that is still training.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from etils import epath
from grain import checkpoint as grain_checkpoint
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from diffdis_jax.common import buckets
from diffdis_jax.common.params import Params
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.errors import Preempted, UserError, may_pass, parse_json
from diffdis_jax.parallel import processes
from diffdis_jax.run import committed

_Arrays = dict[str, tuple[tuple[int, ...], Any]]  # dotted path -> shape, dtype


@runtime_checkable
class State(Protocol):
  """What of the training state is saved. `ema` holds the averaged ones of `params`, `teacher` those that a run distils
  from; either may be empty."""

  @property
  def params(self) -> Params: ...

  @property
  def ema(self) -> Params: ...

  @property
  def opt_state(self) -> Any: ...

  @property
  def teacher(self) -> Params: ...


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint in memory. The data iterator is restored in place."""

  params: Params
  ema: Params
  opt_state: Any
  teacher: Params
  meta: dict[str, Any]


class Checkpointer:
  """Saves a run in the background, and resumes it. One per training run: it clears away interrupted saves.

  A context manager: on the way out it finishes the save in progress.

  Args:
    workdir: folder of the run.
    kept: which checkpoints stay.
    save_timeout: seconds after which a save in the background has failed.
  """

  def __init__(
    self, workdir: epath.PathLike, kept: CheckpointPolicy | None = None, *, save_timeout: int = 1200
  ) -> None:
    kept = kept or CheckpointPolicy()
    self._workdir = workdir
    if processes.is_first():
      _set_aside_uncommitted(committed.folder(workdir))
    processes.barrier("uncommitted checkpoints are set aside")
    rules: list[Any] = [policies.LatestN(kept.keep_last)]
    if kept.keep_every:
      rules.append(policies.EveryNSteps(kept.keep_every))
    rank = functools.partial(_rank, name=kept.best_metric, sign=1 if kept.best_is == "max" else -1)
    if kept.keep_best:
      rules.append(policies.BestN(get_metric_fn=rank, n=kept.keep_best, keep_checkpoints_without_metrics=False))
    self._manager = ocp.CheckpointManager(
      committed.folder(workdir),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(rules),
        cleanup_tmp_directories=True,
        best_fn=rank if kept.keep_best else None,
        async_options=ocp.AsyncOptions(timeout_secs=save_timeout),
      ),
    )

  def latest_step(self) -> int | None:
    """The newest committed step, or None before the first; as process 0 sees it."""
    step = latest_step(self._workdir)
    found = int(processes.from_first(np.int32(-1 if step is None else step)))
    return None if found < 0 else found

  def save(
    self,
    step: int,
    state: State,
    data_iterator: Any = None,
    *,
    meta: dict[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts a save; returns as soon as the arrays may be donated. Returns False if this step is saved already.

    Args:
      step: number of finished steps; larger than that of any earlier save.
      state: its arrays are copied before this returns.
      data_iterator: Grain iterator whose next batch is the first one not trained on.
      meta: a few JSON values to keep beside them.
      metrics: of evaluations at this step, the same on every process; without them it is not among the best.
    """
    if step in self._manager.all_steps():
      return False
    trees = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state, "teacher": state.teacher}
    if jax.process_count() == 1:
      trees = jax.tree.map(_on_one_device, trees)
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
    if data_iterator is not None:
      items["data"] = grain_checkpoint.CheckpointSave(data_iterator)
    items["meta"] = ocp.args.JsonSave({"step": step, **(meta or {})})
    with _os_errors():
      return self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None, force=True)

  def restore(self, step: int, abstract: State, data_iterator: Any = None) -> Restored:
    """Reads a checkpoint onto the devices that `abstract` asks for, and sets the data iterator to it.

    Args:
      step: a committed step.
      abstract: ShapeDtypeStructs with shardings; these need not be those of the run that saved.
      data_iterator: a Grain iterator built as the saved one was.

    Raises:
      UserError: no such checkpoint, or one that is incomplete or does not fit `abstract`.
    """
    path = find(self._workdir, step)
    restored = Restored(
      params=_read_tree(path / "params", abstract.params),
      ema=_read_tree(path / "ema", abstract.ema),
      opt_state=_read_tree(path / "opt_state", abstract.opt_state),
      teacher=_read_tree(path / "teacher", abstract.teacher),
      meta=_read(path / "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore()),
    )
    if data_iterator is not None:
      position = _read_position(path / "data")
      _guard(path / "data", lambda: data_iterator.set_state(position))
      data_iterator.start_prefetch()
    return restored

  def wait(self) -> None:
    """Returns when the save in progress is committed. Raises what went wrong with it."""
    with _os_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the background threads."""
    with _os_errors():
      self._manager.close()

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # A UserError, such as a loss that is not finite, reaches every process; after a bug in one process the others
    # will not come to the barrier at which `close` waits for them.
    if kind is None or issubclass(kind, (UserError, Preempted)) or jax.process_count() == 1:
      self.close()


def restore_params(
  workdir: epath.PathLike, *, step: int | None = None, ema: bool = True, abstract: Params | None = None
) -> Params:
  """Parameters of a run, for use without its optimizer.

  Args:
    workdir: folder of the run.
    step: which checkpoint; None takes the newest.
    ema: whether averaged parameters, where the run keeps them, replace the raw ones.
    abstract: ShapeDtypeStructs with shardings; without it everything lands on the first device.

  Raises:
    UserError: no such checkpoint, or one that is incomplete or does not fit `abstract`.
  """
  path = find(workdir, step)
  if not (ema and (path / "ema").exists()):
    return _read_tree(path / "params", abstract)
  averaged = _saved(path / "ema").keys()
  raw = _read_tree(path / "params", abstract, without=averaged)
  return raw | _read_tree(path / "ema", abstract and {name: abstract[name] for name in averaged if name in abstract})


def saved_params(workdir: epath.PathLike, *, step: int | None = None) -> Params:
  """Shapes and dtypes of a run's parameters, as jax.ShapeDtypeStruct.

  Raises:
    UserError: no such checkpoint.
  """
  saved = _saved(find(workdir, step) / "params")
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in saved.items()}


def latest_step(workdir: epath.PathLike) -> int | None:
  """The newest committed step of a run, or None."""
  return max(committed.committed_steps(committed.folder(workdir)), default=None)


class Best(NamedTuple):
  """The checkpoint that was saved with the best value of a metric."""

  step: int
  value: float


def best(workdir: epath.PathLike, kept: CheckpointPolicy) -> Best | None:
  """By `kept.best_metric`, among the checkpoints that are there; the earliest of equals. None where none has it."""
  folder, found = committed.folder(workdir), []
  for step in committed.committed_steps(folder) if kept.best_metric else ():
    try:
      metrics = committed.metrics_of(folder, step)
    except (OSError, UserError) as error:
      logging.warning("what checkpoint %d was measured at cannot be read: %s", step, error)
      continue
    if kept.best_metric in metrics:
      found.append(Best(step, float(metrics[kept.best_metric])))
  sign = 1 if kept.best_is == "max" else -1
  return max(found, key=lambda each: sign * each.value, default=None)


def find(workdir: epath.PathLike, step: int | None = None) -> epath.Path:
  """The folder of a committed checkpoint, the newest one for None.

  Raises:
    UserError: there is none, or its save was interrupted.
  """
  folder = committed.folder(workdir)
  steps = committed.committed_steps(folder)
  there = f"committed there: {', '.join(map(str, steps)) or 'none'}"
  if step is None and not steps:
    raise UserError(f"no checkpoint in {folder}; train first, or wait for the first save")
  step = steps[-1] if step is None else step
  if step not in steps:
    if (folder / str(step)).exists():
      raise UserError(f"checkpoint {step} in {folder} was never committed: it has no {committed.COMMIT_MARK}; {there}")
    raise UserError(f"no checkpoint {step} in {folder}; {there}")
  return folder / str(step)


def choose(workdir: epath.PathLike, step: int | None, *, ema: bool) -> tuple[int, bool]:
  """Which checkpoint `restore_params` takes for these wishes, and whether its weights are averaged ones.

  Raises:
    UserError: there is none, or its save was interrupted.
  """
  saved = find(workdir, step)
  return int(saved.name), ema and (saved / "ema").exists()


def _set_aside_uncommitted(folder: epath.Path) -> None:
  """Renames step folders without a commit mark: Orbax would trust them, and refuse to save that step again.

  In a bucket, where every save writes under its own name, they are what a killed one leaves, and cannot be renamed at
  once: there they are removed.
  """
  for path in committed.all_steps(folder):
    if (path / committed.COMMIT_MARK).exists():
      continue
    if buckets.is_url(path):
      logging.warning("checkpoint %s has no %s: its save was interrupted; removing it", path, committed.COMMIT_MARK)
      path.rmtree()
    else:
      aside = path.with_name(f"{path.name}.uncommitted")
      logging.warning("checkpoint %s has no %s and is ignored; it is now %s", path, committed.COMMIT_MARK, aside.name)
      if aside.exists():
        aside.rmtree()
      path.rename(aside)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
  """Makes OSError of what TensorStore raises for a full disk."""
  try:
    yield
  except ValueError as error:
    if "No space left on device" not in str(error):
      raise
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _on_one_device(array: Any) -> Any:
  """A replicated array as one of its devices holds it. Else Orbax has every device write a slice, to share the work
  among hosts, and compiles the slicing for each shape."""
  return array.addressable_data(0) if isinstance(array, jax.Array) and array.is_fully_replicated else array


def _rank(metrics: Mapping[str, float], *, name: str, sign: int) -> float:
  return sign * metrics[name] if name in metrics else -np.inf


def _read_position(path: epath.Path) -> dict[str, Any]:
  """The data iterator's position. Each process has saved it, and it is the same for all, however many there are."""

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
  saved = _saved(path)
  if abstract is None:
    abstract = {name: jax.ShapeDtypeStruct(*array) for name, array in saved.items()}
  _check_fits(path, saved, abstract)
  one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one_device), abstract)
  target = {name: x for name, x in target.items() if name not in without} if without else target
  if not jax.tree.leaves(target):
    return target
  readers = ocp.type_handlers.create_type_handler_registry((jax.Array, _PatientReader()))
  restore_args = ocp.checkpoint_utils.construct_restore_args(target)
  args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=bool(without))
  return _read(path, ocp.PyTreeCheckpointHandler(type_handler_registry=readers), args)


class _PatientReader(ocp.type_handlers.ArrayHandler):
  """Where an array cannot be read, waits for the others before it raises. Else Orbax closes its event loop at once, and
  each read that ends later prints a traceback."""

  async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
    earlier = asyncio.all_tasks()
    try:
      return await super().deserialize(infos, args)
    finally:
      while reads := asyncio.all_tasks() - earlier:
        await asyncio.gather(*reads, return_exceptions=True)


def _saved(path: epath.Path) -> _Arrays:
  return _arrays(_guard(path, lambda: ocp.StandardCheckpointHandler().metadata(path).tree))


def _arrays(tree: Any) -> _Arrays:
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(key, simple=True, separator="."): (tuple(x.shape), x.dtype) for key, x in leaves}


def _check_fits(path: epath.Path, saved: _Arrays, abstract: Any) -> None:
  wanted = _arrays(abstract)
  differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
  if differing:
    name = differing[0]
    raise UserError(
      f"checkpoint {path} does not fit this model in {len(differing)} arrays; the first, {name}, is "
      f"{_describe(saved.get(name))} there and {_describe(wanted.get(name))} here; take the config it was saved with"
    )


def _describe(array: tuple[tuple[int, ...], Any] | None) -> str:
  return "absent" if array is None else f"{array[1]}{list(array[0])}"


def _read(path: epath.Path, handler: Any, args: Any) -> Any:
  def restore() -> Any:
    with ocp.Checkpointer(handler) as checkpointer:
      return checkpointer.restore(path, args=args)

  return _guard(path, restore)


# What readers raise for bytes that are not those that were written; NotImplementedError is of Orbax's `_sharding`.
_OF_DAMAGE = (UserError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, OSError)


def _guard(path: epath.Path, read: Callable[[], Any]) -> Any:
  """Calls `read`; a checkpoint that lacks files or bytes is bad input, and not a bug."""
  otherwise = "take another step, or move its folder elsewhere to go on from the one before"
  if not path.exists():
    raise UserError(f"checkpoint {path.parent} is incomplete: it has no {path.name}; {otherwise}")
  try:
    return read()
  except Exception as error:
    # Orbax raises a bare Exception for an array, with what was wrong as its cause.
    reason = error.__cause__ if type(error) is Exception else error
    if not isinstance(reason, _OF_DAMAGE) or may_pass(reason):
      raise
    text = " ".join(str(reason).split())[:200]
    raise UserError(f"checkpoint {path.parent} cannot be read: its {path.name}: {text}; {otherwise}") from error
