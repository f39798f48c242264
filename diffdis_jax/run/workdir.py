"""The folder of a run: config.json, whether a run may resume under the present config, and who is in it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from absl import logging
from etils import epath

from diffdis_jax.common import buckets, guesses
from diffdis_jax.common.files import sweep, write_whole
from diffdis_jax.config.fields import SECTIONS, as_text, read_json_object
from diffdis_jax.config.section import normalise
from diffdis_jax.errors import FULL_DISK, UserError, may_pass, parse_json
from diffdis_jax.run import committed

BEAT = 5.0  # seconds between two signs of life of the process that holds a workdir
PATIENCE = 20.0  # seconds without one after which it is dead, if it is on another machine
ENDING = 3.0  # seconds that a process of this machine is given to end
# Seconds, more than a write takes, after which the last of several that began at one moment has the workdir.
SETTLING, SETTLING_IN_A_BUCKET = 0.2, 2.0
MAY_CHANGE = (
  r"^(log|save|eval|sample)_every$",
  r"^(train_evals|sample_prompts|inference)(\.|$)",
  r"^(checkpoint|evals|mesh)(\.|$)",
  r"^data\.loader\.(num_threads|prefetch)$",
  r"^optim\.allow_uninitialized$",  # of the start alone
  r"^optim\.skip_",  # of steps without which the run would have ended, or soon been of no use
)
"""Fields (dotted paths) that may differ when a run resumes: they leave the numbers of the training alone."""
# Fields that differ in a run that is longer, or whose data have moved.
_OF_NO_NUMBER = r"^num_steps$|^data\.(mixture\.[^.]+\.)?path$"
REPORTS = ("metrics.jsonl", "history.jsonl", "trackers.json", "events.out.tfevents.*", "samples", "plugins")


def open_for_training(
  workdir: epath.PathLike, config: Mapping[str, Any], *, is_writer: bool = True, moved: Collection[str] = ()
) -> epath.Path:
  """Creates the folder and writes its config.json, or checks that the run in it has the same config.

  A run without a checkpoint does not hold its config: what it has reported is set aside, so that it mixes with nothing.

  Args:
    workdir: the folder; local, or any path that etils.epath reads.
    config: the run's, as nested dicts of tuples, numbers, strings, booleans and None.
    is_writer: whether this process writes; one of several processes does.
    moved: as `check_config` takes it.

  Raises:
    UserError: the folder cannot be made, or holds a run whose config differs in a field outside MAY_CHANGE.
    OSError: it cannot be written now, or its disk is full.
  """
  path = buckets.path(workdir)
  replaced = check_config(workdir, config, moved=moved)
  if is_writer:
    try:
      path.mkdir(parents=True, exist_ok=True)
      if not buckets.is_url(path):
        sweep(path)
        sweep(path / "samples")
      if replaced:
        aside = _set_aside(path)
        logging.warning(
          "the config of a run without a checkpoint is replaced: %s; what it has reported is now in %s",
          ", ".join(replaced),
          aside,
        )
      write_whole(path / "config.json", as_text(config).encode())
    except OSError as error:
      _refuse(workdir, error)
  return path


def _refuse(workdir: epath.PathLike, error: OSError) -> NoReturn:
  """Where a workdir cannot be written. Raises UserError, or of what may pass, and of a full disk, the error itself, on
  which a launcher starts the run again."""
  if may_pass(error) or error.errno in FULL_DISK:
    raise error
  raise UserError(f"cannot write to --workdir={workdir}: {error.strerror or error}") from error


def check_config(workdir: epath.PathLike, config: Mapping[str, Any], *, moved: Collection[str] = ()) -> list[str]:
  """Checks that a run may resume under this config, if there is one in the folder that has a checkpoint.

  Args:
    workdir: the folder.
    config: nested dicts.
    moved: fields that may differ as well, such as a path at which the same data lie.

  Returns:
    What differs in fields outside MAY_CHANGE, a phrase for each, where the run there has no checkpoint.

  Raises:
    UserError: something differs, and the run there has a checkpoint; or config.json is of no training run. A larger
      `num_steps` is taken: the run gets longer.
  """
  path = buckets.path(workdir)
  if not (path / "config.json").exists():
    return []
  config_there = read_json_object(path)
  there, here = flatten(config_there), flatten(config)
  may_be_replaced = SECTIONS <= config_there.keys() and committed.latest_step(workdir) is None
  if not may_be_replaced and steps_before(there, here) is not None:
    del there["num_steps"], here["num_steps"]
  there, here = ({name: fields[name] for name in fields.keys() - {*moved}} for fields in (there, here))
  differing = differences(there, here)
  if differing and not may_be_replaced:
    raise UserError(f"{path} holds a run of another config: {', '.join(differing)}; take its config or a new --workdir")
  return differing


def lengthened(workdir: epath.PathLike, config: Mapping[str, Any]) -> int | None:
  """The `num_steps` of the run there, where it has a checkpoint and this config makes it longer; or else None."""
  path = buckets.path(workdir)
  if not (path / "config.json").exists() or committed.latest_step(workdir) is None:
    return None
  return steps_before(flatten(read_json_object(path)), flatten(config))


def steps_before(there: Mapping[str, Any], here: Mapping[str, Any]) -> int | None:
  """`num_steps` there, if that is fewer than here, of configs as `flatten` gives them."""
  before, after = there.get("num_steps"), here.get("num_steps")
  return before if isinstance(before, int) and isinstance(after, int) and before < after else None


def _set_aside(path: epath.Path) -> epath.Path:
  """The new folder of what a run has written beside checkpoints. For a tracker the next run is another one."""
  aside = next(each for n in itertools.count(1) if not (each := path / f"replaced_{n}").exists())
  aside.mkdir()
  (path / "config.json").copy(aside / "config.json")
  for pattern in REPORTS:
    for file in path.glob(pattern):
      file.rename(aside / file.name)
  return aside


class InUse(UserError):
  """Another live process has the workdir."""


class Lock:
  """The right to write into a workdir, for one process at a time. A context manager.

  Its file, `lock.json`, is written again every BEAT seconds. What a killed process has left is taken over: at once if
  that was on this machine, where one can look, else when it has not changed for PATIENCE seconds. So is what came with
  a copy of a folder whose run lives.
  """

  def __init__(self, workdir: epath.PathLike):
    self._workdir = workdir
    self._file = buckets.path(workdir) / "lock.json"
    self._own = {"owner": secrets.token_hex(8), "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
    self._own["started"] = _started(os.getpid())
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._keep_beating, name="lock", daemon=True)
    self._beats = 0

  def __enter__(self) -> Lock:
    """Raises InUse if a live process has the workdir, UserError if it cannot be written, OSError if not now."""
    try:
      self._file.parent.mkdir(parents=True, exist_ok=True)  # fails at once where there can be no folder
      self._own["folder"] = _folder(self._file.parent)
      self._wait_for_other()
      self._beat()
    except OSError as error:
      _refuse(self._workdir, error)
    try:
      time.sleep(SETTLING_IN_A_BUCKET if buckets.is_url(self._file) else SETTLING)
      other = self._read() or {}
      if other.get("owner", self._own["owner"]) != self._own["owner"]:
        raise self._in_use(other)
      self._thread.start()
    except BaseException:  # Ctrl-C too, after which a notebook lives on, and its next run would wait for this one
      self._remove()
      raise
    return self

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()  # or a beat under way would write the file again
    self._remove()

  def _remove(self) -> None:
    """The file, where it is this one's."""
    try:
      if (self._read() or {}).get("owner") == self._own["owner"]:
        self._file.unlink(missing_ok=True)
    except Exception as error:  # of a disk or a bucket, which must not take the place of why the run ended
      logging.warning("cannot remove %s: %s", self._file, getattr(error, "strerror", None) or error)

  def _wait_for_other(self) -> None:
    first = other = self._read()
    begin = time.monotonic()
    while other is not None and not _is_dead(other):
      # In a copy of the folder too, that process says nothing of this one, and does not renew the file.
      here = (other.get("machine"), other.get("folder")) == (self._own["machine"], self._own["folder"])
      if time.monotonic() - begin > (ENDING if here else PATIENCE):
        # Clocks of two machines differ, so that only a file that does not change tells that its process is dead.
        if other == first and not here:
          break
        raise self._in_use(other)
      time.sleep(0.2)
      other = self._read()

  def _in_use(self, other: dict[str, Any]) -> InUse:
    return InUse(
      f"--workdir={self._workdir} is in use by process {other.get('pid')} on {other.get('host')}; wait for it, stop"
      " it, or take another --workdir"
    )

  def _beat(self) -> None:
    self._beats += 1
    write_whole(self._file, json.dumps({**self._own, "beats": self._beats}).encode())

  def _keep_beating(self) -> None:
    while not self._done.wait(BEAT):
      try:
        other = self._read() or {}
        if other.get("owner", self._own["owner"]) != self._own["owner"]:
          sys.stderr.write(
            f"error: --workdir={self._workdir} was taken over by process {other.get('pid')} on {other.get('host')}\n"
          )
          # sys.exit would end this thread alone, and each further write would mix two runs.
          os._exit(2)
        self._beat()
      except Exception as error:  # of whatever storage it is, which may be back at the next beat
        logging.warning("cannot renew %s: %s", self._file, error)

  def _read(self) -> dict[str, Any] | None:
    try:
      found = parse_json(self._file.read_bytes(), "lock.json")
    except FileNotFoundError:
      return None
    except (PermissionError, NotADirectoryError):
      raise  # for which no waiting helps
    except (OSError, UserError):  # of storage that may be back at the next look, or of a file that is damaged
      return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
  """Where a process number means something: this boot of the machine, and the container."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    # Without /proc nothing can be looked up: no other process then counts as one of this machine.
    return f"{socket.gethostname()} {secrets.token_hex(8)}"


def _folder(path: epath.Path) -> str:
  """What tells a folder from its copies on this machine, whatever path leads to it."""
  return os.fspath(path) if buckets.is_url(path) else str(os.stat(path).st_ino)


def _started(pid: int | None) -> str:
  """When the process started, or "" if it is dead."""
  try:
    # Behind the last bracket: the program's name before it may hold spaces and brackets.
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  # A zombie has ended. The start time, since the number is given to later processes as well.
  return "" if fields[0] == "Z" else fields[19]


def _is_dead(other: dict[str, Any]) -> bool:
  return other.get("machine") == _machine() and _started(other.get("pid")) != other.get("started")


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a config by their dotted paths, lists as tuples. A section without fields stands for itself."""
  return guesses.fields_of(normalise(config))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """What differs between two configs, as `flatten` gives them, in fields outside MAY_CHANGE: a phrase for each."""

  def shown(fields: Mapping[str, Any], field: str) -> str:
    return repr(fields[field]) if field in fields else "absent"

  return [
    f"{field} is {shown(there, field)} there and {shown(here, field)} here"
    for field in sorted(there.keys() | here.keys())
    if (field in there, there.get(field)) != (field in here, here.get(field)) and not may_change(field)
  ]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """What the numbers of a training depend on: the fields outside `MAY_CHANGE`, by their dotted paths."""
  return {field: value for field, value in flatten(config).items() if not may_change(field)}


def digest(fields: Mapping[str, Any]) -> str:
  """Eight hexadecimal digits of the SHA-256 of the fields as JSON, sorted."""
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def run_digest(workdir: epath.PathLike) -> str:
  """Give the digest of a run's config by which its checkpoints know it; empty where there is no config.json.

  It covers what the numbers of the training depend on, but for its length and for where its data lie.

  Raises:
    UserError: config.json is damaged.
  """
  path = buckets.path(workdir)
  if not (path / "config.json").exists():
    return ""
  fields = identity(read_json_object(path))
  return digest({name: value for name, value in fields.items() if not re.search(_OF_NO_NUMBER, name)})


def may_change(field: str) -> bool:
  """Whether a field, by its dotted path, leaves the numbers of a training alone."""
  return any(re.search(pattern, field) for pattern in MAY_CHANGE)
