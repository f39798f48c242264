"""Near checkpoints: what each process's devices hold, on a disk of its own host, saved more often than the workdir's.

A near checkpoint is `DIR/<run>/<process>/<step>/`: a file of raw bytes for each part of the state, `meta.json`, the
digests and the commit mark. It is lost with its host. So a run resumes from the newest one that every process has whole
if that is beyond the workdir's newest, which holds the whole state for any number of processes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from diffdis_jax.common import storage
from diffdis_jax.errors import UserError, parse_json
from diffdis_jax.parallel import processes
from diffdis_jax.run import committed, digests, history, restore
from diffdis_jax.run.restore import Restored
from diffdis_jax.structs import TrainState

_META = "meta.json"
_MOST = 4  # near checkpoints that a process tells the others of; it keeps two
# What a file that is damaged, or of another model or mesh, makes its reader raise.
_UNUSABLE = (OSError, UserError, KeyError, TypeError, ValueError)


class _Shard(NamedTuple):
  """Part of an array: its name in the tree, where it begins and ends along each axis, and its dtype."""

  name: str
  index: tuple[tuple[int, int], ...]
  dtype: str

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in self.index)

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Near:
  """Saves and reads the near checkpoints of a run. Every process makes each call, at the same step.

  A context manager: on the way out it finishes the save in progress, and removes all of them once the run has ended
  well, whose last checkpoint is in the workdir.

  Args:
    workdir: of the run.
    folder: on a disk of this host; may be that of other runs too.
    every: steps between two saves.
  """

  def __init__(self, workdir: epath.PathLike, folder: epath.PathLike, every: int):
    self._workdir, self._root, self._every = workdir, epath.Path(folder).absolute(), every
    self._own: epath.Path | None = None  # of this process and run; None before the run's first start is on record
    self._whole: int | None = None  # the newest step that every process has whole
    self._saving: int | None = None
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="near")
    self._written: concurrent.futures.Future[None] | None = None

  def check(self) -> None:
    """Raises UserError, on every process: the folder cannot be written on some host."""
    reason, probe = "", self._root / f".{secrets.token_hex(4)}.tmp"
    try:
      self._root.mkdir(parents=True, exist_ok=True)
      probe.write_bytes(b"")
      probe.unlink()
    except OSError as error:
      reason = f"cannot write to --near={self._root}: {error.strerror or error}"
    if message := processes.first_message(reason):
      raise UserError(message)

  def is_due(self, step: int) -> bool:
    """Whether this step is saved."""
    return step % self._every == 0

  def save(self, step: int, state: TrainState, data_iterator: Any, *, meta: dict[str, Any], ready: bool) -> None:
    """Starts a save; returns as soon as the arrays may be donated. What goes wrong with one is a warning in the log.

    Args:
      step: number of finished steps.
      state: its arrays are copied before this returns.
      data_iterator: Grain iterator whose next batch is the first one not trained on.
      meta: a few JSON values to keep beside them.
      ready: whether what the run has reported so far is in its workdir; counts on process 0. Without it there is no
        save, from which the run would resume without these lines.
    """
    # Before anything is removed, every process has the one before: else a slow disk and a fast one would share none.
    answers = processes.gathered(np.array([self._is_written(), ready], np.uint8)).reshape(-1, 2)
    if self._saving is not None and answers[:, 0].all():
      self._whole = self._saving
    self._saving = None
    if not answers[0, 1]:
      logging.warning("no near checkpoint of step %d: the run's metrics cannot be written to %s", step, self._workdir)
      return
    if self._own is None:
      self._own = self._find_own()
    if self._own is None:  # history.jsonl was removed
      return
    trees = {name: _on_host(getattr(state, name)) for name in restore.STORED}
    arrays = {name: [(*key, str(value.dtype)) for key, value in tree.items()] for name, tree in trees.items()}
    content = {"meta": {"step": step, **meta}, "data": data_iterator.get_state(), "arrays": arrays}
    files = {name: [*tree.values()] for name, tree in trees.items()}
    self._saving = step
    self._written = self._pool.submit(_write, self._own, step, files, content, keep=self._whole)

  def restore(self, abstract: TrainState, data_iterator: Any, *, beyond: int) -> Restored | None:
    """Reads the newest near checkpoint beyond that step which every process has whole, and sets the data iterator to
    it; None where there is none.

    Args:
      abstract: ShapeDtypeStructs with shardings.
      data_iterator: a Grain iterator built as the saved one was.
      beyond: a step.
    """
    self._is_written()
    self._saving = self._whole = None
    before, self._own = self._own, self._find_own()
    if before not in (None, self._own):
      shutil.rmtree(before, ignore_errors=True)  # of steps that the run has gone back on
    for step in self._common_steps():
      if step <= beyond:
        break
      found = self._read(step, abstract)
      if processes.gathered(np.uint8(found is not None)).all() and found is not None:
        data_iterator.set_state(found.position)
        data_iterator.start_prefetch()
        self._whole = step
        return Restored(found.state, found.meta)
    return None

  def _find_own(self) -> epath.Path | None:
    """By the workdir's address and the time since when its steps count: a workdir that is made again, copied, or gone
    back to an earlier step, has near checkpoints of its own."""
    key = b""
    if processes.is_first():
      since = storage.patiently(lambda: history.since(self._workdir), f"{self._workdir}")
      key = hashlib.sha256(f"{committed.folder(self._workdir)} {since}".encode()).digest()[:8] if since else b""
    key = processes.from_first(np.frombuffer(key.ljust(8, b"\0"), np.uint8)).tobytes()
    return self._root / key.hex() / str(jax.process_index()) if any(key) else None

  def _common_steps(self) -> list[int]:
    """Steps of those that every process has, the newest first."""
    there = committed.committed_steps(self._own) if self._own else []
    mine = np.array([-1] * _MOST + there, np.int32)[-_MOST:]
    common = set.intersection(*(set(row.tolist()) for row in processes.gathered(mine).reshape(-1, _MOST)))
    return sorted(common - {-1}, reverse=True)

  def _read(self, step: int, abstract: TrainState) -> _Found | None:
    """This process's part; None where it is damaged, or of another mesh or model."""
    assert self._own is not None
    path = self._own / str(step)
    try:
      damage = digests.damage(path) if (path / digests.NAME).exists() else digests.Damage(digests.NAME, "is missing")
      if damage is None:
        return _read(path, abstract)
      reason = f"{damage.file} {damage.what}"
    except _UNUSABLE as error:
      reason = " ".join(str(error).split())[:200]
    logging.warning("the near checkpoint %s is not taken: %s", path, reason)
    return None

  def wait(self) -> None:
    """Returns when the save in progress has ended."""
    if self._written is not None:
      concurrent.futures.wait([self._written])

  def _is_written(self) -> bool:
    """Waits for the save in progress; whether it is whole, or there was none."""
    written, self._written = self._written, None
    try:
      if written is not None:
        written.result()
    except OSError as error:
      logging.warning("near checkpoint %s cannot be written: %s; the next save tries again", self._saving, error)
      return False
    return True

  def __enter__(self) -> Near:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._is_written()
    self._pool.shutdown()
    if kind is None and self._own is not None:
      shutil.rmtree(self._own, ignore_errors=True)
      with contextlib.suppress(OSError):
        os.rmdir(self._own.parent)  # unless another process of this host has its own there


def _write(
  own: epath.Path, step: int, files: dict[str, list[np.ndarray]], content: dict[str, Any], *, keep: int | None
) -> None:
  """In the background: removes all near checkpoints but that of step `keep`, and writes one. Raises OSError."""
  for path in own.iterdir() if own.is_dir() else ():
    if path.name != str(keep):
      shutil.rmtree(path)
  unfinished = own / f"{step}.tmp"
  try:
    unfinished.mkdir(parents=True)
    for name, arrays in files.items():
      with (unfinished / name).open("wb") as file:
        for array in arrays:
          file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    (unfinished / _META).write_text(json.dumps(content))
    digests.write(unfinished)
    (unfinished / committed.COMMIT_MARK).write_text("")
    unfinished.rename(own / str(step))
  except OSError:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise


class _Found(NamedTuple):
  state: TrainState
  meta: dict[str, Any]
  position: dict[str, Any]


def _read(path: epath.Path, abstract: TrainState) -> _Found:
  """Raises one of _UNUSABLE."""
  content = parse_json((path / _META).read_bytes(), _META)
  trees = {}
  for name in restore.STORED:
    shards = [_Shard(each, tuple(map(tuple, index)), dtype) for each, index, dtype in content["arrays"][name]]
    trees[name] = _read_tree(path / name, shards, getattr(abstract, name))
  return _Found(TrainState(**trees), content["meta"], content["data"])


def _read_tree(path: epath.Path, shards: list[_Shard], abstract: Any) -> Any:
  begins = dict(zip(shards, np.cumsum([0, *(shard.nbytes for shard in shards)]).tolist(), strict=False))

  def read(key: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    known: dict[_Shard, np.ndarray] = {}  # of a replicated array, which is read once

    def part(index: Any) -> np.ndarray:
      shard = _Shard(_name(key), _bounds(index, like.shape), str(like.dtype))
      if shard not in known:
        if shard not in begins:
          raise UserError(f"it lacks {shard.name}, {shard.dtype}{[*shard.index]}")
        found = np.fromfile(path, np.uint8, count=shard.nbytes, offset=begins[shard])
        known[shard] = found.view(jnp.dtype(shard.dtype)).reshape(shard.shape)
      return known[shard]

    return jax.make_array_from_callback(like.shape, like.sharding, part)

  return jax.tree_util.tree_map_with_path(read, abstract)


def _on_host(tree: Any) -> dict[tuple[str, tuple[tuple[int, int], ...]], np.ndarray]:
  """Copies of the parts that this process's devices hold, each once: name and bounds -> values."""
  parts = {}
  for key, array in jax.tree.leaves_with_path(tree):
    for shard in array.addressable_shards:
      parts.setdefault((_name(key), _bounds(shard.index, array.shape)), shard)
  for shard in parts.values():
    shard.data.copy_to_host_async()
  # A CPU device's array is seen without a copy, and its memory is the next step's.
  return {
    key: np.array(shard.data) if shard.device.platform == "cpu" else np.asarray(shard.data)
    for key, shard in parts.items()
  }


def _name(key: Any) -> str:
  return jax.tree_util.keystr(key)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
  return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
