"""Several processes as one run: how they find each other, agree, and stop together.

A verb calls `start` before anything touches a device. The processes are found, in this order, by the flags
--coordinator_address, --num_processes and --process_id (or DIFFDIS_COORDINATOR_ADDRESS, ...), in a Slurm step, on a
Cloud TPU (a VM's metadata, or what GKE sets). Elsewhere there is one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import os
import re
import secrets
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax._src import distributed
from jax.experimental import multihost_utils

from diffdis_jax.common import buckets, signals
from diffdis_jax.errors import FULL_DISK, INTERRUPTED, PREEMPTED, Interrupted, Preempted, UserError, may_pass

# Seconds after which a silent process is dead, and the others end; longer where a process may be silent while it waits
# for a bucket.
HEARTBEAT_TIMEOUT = 10
HEARTBEAT_TIMEOUT_OVER_BUCKETS = 100
SHUTDOWN_TIMEOUT = 3600  # seconds that processes which are done wait for the one that still writes
BARRIER_TIMEOUT = 3600  # seconds that a process waits for the others, such as for one that compiles for long
_MESSAGE = 1000  # bytes of an error that the processes tell each other
AT_ONCE = 2**30  # bytes at a time, of all processes together, which each device of each of them gets
_VISIBILITY = 30.0  # seconds in which a file of one host must show on the others
_VARIABLES = {
  "coordinator_address": ("DIFFDIS_COORDINATOR_ADDRESS",),
  "num_processes": ("DIFFDIS_NUM_PROCESSES",),
  "process_id": ("DIFFDIS_PROCESS_ID", "JOB_COMPLETION_INDEX"),  # the latter of a Kubernetes Job with indices
}
_CAUSES = (None, Preempted, Interrupted)  # to stop, the weightiest last; the first is none
_barriers = itertools.count()
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Processes:
  """What `jax.distributed.initialize` gets. None everywhere: it asks the TPU's own environment.

  Attributes:
    local_device_ids: of the accelerators, those that are this process's; None for all that the host has.
  """

  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None


def start() -> None:
  """Joins the other processes of the run and logs which one this is and its devices; alone, does nothing.

  From then on an exception that nothing catches, in any thread, ends this process at once, and the others within
  --heartbeat_timeout seconds.

  Raises:
    UserError: contradicting settings, or a device that cannot be had.
  """
  values = flags.FLAGS.flag_values_dict()
  found = find({name: values[name] for name in _VARIABLES}, os.environ)
  if found is not None:
    # An ablation's runs are kept in its --out.
    heartbeat = values["heartbeat_timeout"] or default_heartbeat_timeout(values.get("workdir"), values.get("out"))
    _initialize(found, values["coordinator_timeout"], heartbeat)
    log_place()


def default_heartbeat_timeout(*kept: str | None) -> int:
  """In seconds, by the folders in which a run and what is made of it are kept."""
  return HEARTBEAT_TIMEOUT_OVER_BUCKETS if any(map(buckets.is_url, filter(None, kept))) else HEARTBEAT_TIMEOUT


def log_place() -> None:
  """Which host this is, and the devices."""
  logging.info(
    "host %d of %d, %d of %d devices (%s)",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
    jax.devices()[0].device_kind,
  )


def find(given: Mapping[str, str | int | None], environ: Mapping[str, str]) -> Processes | None:
  """The processes that flags, or else the environment, tell of; None for one process.

  Raises:
    UserError: some of the three settings, but not all; or settings that contradict each other.
  """
  settings = {}
  for name, variables in _VARIABLES.items():
    values = [given[name], *(environ.get(variable) for variable in variables)]
    settings[name] = next((value for value in values if value not in (None, "")), None)
  if settings["coordinator_address"] or settings["num_processes"] or given["process_id"] is not None:
    return _explicit(**settings)
  if all(name in environ for name in _SLURM):
    return _slurm(environ) if int(environ["SLURM_STEP_NUM_TASKS"]) > 1 else None
  if (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu") and _has_tpu(environ):
    return Processes()
  return None


def _explicit(
  coordinator_address: str | None, num_processes: str | int | None, process_id: str | int | None
) -> Processes | None:
  if coordinator_address is None or num_processes is None or process_id is None:
    raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three of them")
  port = re.fullmatch(r".+:(\d{1,5})", coordinator_address)
  if port is None or not 0 < int(port[1]) < 2**16:
    raise UserError(f"--coordinator_address={coordinator_address} should be HOST:PORT, such as 10.0.0.1:8476")
  try:
    count, index = int(num_processes), int(process_id)
  except ValueError:
    raise UserError(f"--num_processes={num_processes} and --process_id={process_id} should be whole numbers") from None
  if not 0 <= index < count:
    raise UserError(f"--process_id={index} should be from 0 to {count - 1}, since --num_processes={count}")
  return Processes(coordinator_address, count, index) if count > 1 else None


def _slurm(environ: Mapping[str, str]) -> Processes:
  """One task a node has all of its GPUs; of several, each has the one of its number, or those that Slurm shows it."""
  head = re.match(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", environ["SLURM_STEP_NODELIST"])
  assert head is not None  # each of its parts may be empty
  port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
  one_a_node = environ["SLURM_STEP_NUM_TASKS"] == environ.get("SLURM_STEP_NUM_NODES")
  visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
  # Slurm 24.11 has no longer the first.
  per_task = "SLURM_GPUS_PER_TASK" in environ or ":per_task:" in environ.get("SLURM_TRES_BIND", "")
  is_bound = per_task or (len(visible) == 1 and visible != [""])
  return Processes(
    coordinator_address=f"{''.join(part or '' for part in head.groups())}:{port}",
    num_processes=int(environ["SLURM_STEP_NUM_TASKS"]),
    process_id=int(environ["SLURM_PROCID"]),
    local_device_ids=None if one_a_node or is_bound else (int(environ["SLURM_LOCALID"]),),
  )


def _has_tpu(environ: Mapping[str, str]) -> bool:
  """By what GKE sets, or a TPU VM's device files: those of v4 and before, or the later ones, which others have too."""
  files = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  return "TPU_WORKER_HOSTNAMES" in environ or bool(files and importlib.util.find_spec("libtpu"))


def _initialize(processes: Processes, timeout: int, heartbeat: int) -> None:
  """Waits for all processes. At its own timeout jax aborts, with a stack trace, so a timer comes first."""
  if processes.coordinator_address:
    whom = f"the coordinator {processes.coordinator_address}" if processes.process_id else "the other processes"
    who = f"process {processes.process_id} of {processes.num_processes}"
  else:
    who, whom = "this host", "the other hosts of the TPU slice"
  message = (
    f"error: {who} could not reach {whom} within {timeout} seconds; the usual cause is that the command was not"
    " started on all hosts: start it on each of them, or give a longer --coordinator_timeout\n"
  )

  def give_up() -> None:
    sys.stderr.write(message)
    sys.stderr.flush()
    os._exit(1 if "DIFFDIS_LAUNCHED" in os.environ else 2)  # a launcher tries again, as after a dead host

  timer = threading.Timer(timeout, give_up)
  timer.daemon = True
  timer.start()
  # SIGTERM is ours, see PreemptionHandler: jax's own service would swallow it, and asks for agreement at steps alone.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    processes.coordinator_address,
    processes.num_processes,
    processes.process_id,
    local_device_ids=processes.local_device_ids,
    cluster_detection_method="deactivate" if processes.coordinator_address else None,
    initialization_timeout=2 * timeout + 60,
    heartbeat_timeout_seconds=heartbeat,
    shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
  )
  jax.devices()  # every process waits here for the others' devices
  timer.cancel()
  # Host values first move here, where all have just come: at its first exchange between devices Gloo waits 30 s, and
  # for later ones, Orbax's among them, 30 minutes.
  barrier("start")
  from_first(gathered(np.int32(0)))
  threading.excepthook = _as_in_main


def _as_in_main(failed: Any) -> None:
  sys.excepthook(failed.exc_type, failed.exc_value, failed.exc_traceback)


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when every process has come here; the last one may be BARRIER_TIMEOUT seconds late."""
  if jax.process_count() > 1:
    # By the coordination service. multihost_utils.sync_global_devices is itself a program on the devices, to be
    # compiled, for which Gloo waits 30 s and no longer. A barrier's name must be new each time.
    _service().wait_at_barrier(f"diffdis/{next(_barriers)}/{name}", BARRIER_TIMEOUT * 1000)


def _service() -> Any:
  """jax has no public name for this client; its own serialization and Orbax call it so, the same from 0.10 to 0.12."""
  return distributed.global_state.client


class Board:
  """What each process has written for the others. Read and written from any thread, also while devices wait for one.

  Both methods raise RuntimeError where the coordination service does not answer.
  """

  _FOLDER = "diffdis/board/"

  def write(self, text: str) -> None:
    """In place of what this process had written; nothing where `text` is empty."""
    key = f"{self._FOLDER}{jax.process_index()}"
    if text:
      _service().key_value_set(key, text, allow_overwrite=True)
    else:
      _service().key_value_delete(key)

  def others(self) -> list[str]:
    """What stands there of the other processes."""
    mine = f"{self._FOLDER}{jax.process_index()}"
    return [text for key, text in _service().key_value_dir_get(self._FOLDER) if key != mine]


def from_first(value: np.ndarray | np.generic) -> np.ndarray:
  """Process 0's value, on every process. At most 32 bits wide."""
  return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def text_from_first(text: str) -> str:
  """Process 0's text, on every process."""
  mine = np.frombuffer(text.encode(), np.uint8)
  size = int(from_first(np.int32(len(mine))))
  return from_first(np.resize(mine, size)).tobytes().decode()  # of the others the size alone counts


def gathered(value: np.ndarray | np.generic) -> np.ndarray:
  """Every process's value, along a new first axis. At most 32 bits wide."""
  return np.asarray(multihost_utils.process_allgather(np.asarray(value), tiled=False))


def over_hosts(value: np.ndarray) -> np.ndarray:
  """The sum of every process's counts."""
  return value if jax.process_count() == 1 else gathered(value.astype(np.int32)).sum(axis=0, dtype=value.dtype)


def whole(array: jax.Array) -> np.ndarray:
  """A global array, on every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  if array.nbytes > AT_ONCE and (rows := _rows_of_each(array)) is not None:
    return _by_rows(array, rows)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _rows_of_each(array: jax.Array) -> np.ndarray | None:
  """Places [process, row] in an array of those that each process's devices hold; None where it is not split along its
  first axis alone, evenly."""
  rows: list[set[int]] = [set() for _ in range(jax.process_count())]
  for device, index in array.sharding.devices_indices_map(array.shape).items():
    if any(each.indices(size) != (0, size, 1) for each, size in zip(index[1:], array.shape[1:], strict=True)):
      return None
    rows[device.process_index].update(range(len(array))[index[0]])
  return np.array([sorted(each) for each in rows]) if len({*map(len, rows)}) == 1 else None


def _by_rows(array: jax.Array, rows: np.ndarray) -> np.ndarray:
  """The whole array, a few rows of each process at a time: at once they would fill a device, which gets all of them, as
  the 16,384 images of a call of 256 chips would."""
  shards = {shard.index[0].indices(len(array))[0]: shard.data for shard in array.addressable_shards}
  own = np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])
  found, size = np.empty(array.shape, array.dtype), max(1, AT_ONCE * len(array) // array.nbytes // len(rows))
  for first in range(0, len(own), size):
    found[rows[:, first : first + size]] = gathered(own[first : first + size])
  return found


def on_first(action: Callable[[], Any]) -> None:
  """Does it on process 0. Raises UserError on every process if it raises that."""
  if jax.process_count() == 1:
    action()
    return
  message = ""
  if is_first():
    try:
      action()
    except UserError as error:
      message = str(error)
  if message := first_message(message):
    raise UserError(message)


def first_message(message: str) -> str:
  """The message of the first process that has one, on every process; empty where none has. Cut to _MESSAGE bytes."""
  if jax.process_count() == 1:
    return message
  mine = np.frombuffer(message.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0"), np.uint8)
  said = (row.tobytes().rstrip(b"\0") for row in gathered(mine))
  return next(filter(None, said), b"").decode(errors="replace")


def differing(value: str) -> list[int]:
  """The processes that have another text than process 0, the same list on each; none where there is one process."""
  if jax.process_count() == 1:
    return []
  digests = gathered(np.uint32(zlib.crc32(value.encode())))
  return np.flatnonzero(digests != digests[0]).tolist()


def check_shared(workdir: str) -> None:
  """Creates the folder, and looks whether every process sees it.

  Raises:
    UserError: the hosts do not share it, or it cannot be written; on every process.
    OSError: it cannot be written now, or its disk is full; on process 0, whose end ends the others.
  """
  if jax.process_count() == 1:
    return
  path = buckets.path(workdir)
  new, reason = not path.exists(), ""
  nonce = path / f".shared-{from_first(np.uint32(secrets.randbits(32))).item():08x}"
  if is_first():
    try:
      path.mkdir(parents=True, exist_ok=True)
      nonce.write_text("")
    except OSError as error:
      if may_pass(error) or error.errno in FULL_DISK:  # on which a launcher starts the run again
        raise
      reason = str(error.strerror or error)
  written = bool(from_first(np.uint8(not reason)))
  seen = gathered(np.uint8(written and shows(nonce.exists)))
  if is_first() and written:
    nonce.unlink()
    if new and not seen.all() and not buckets.is_url(path):
      path.rmdir()
  if not written:
    raise UserError(f"cannot write to --workdir={workdir}{f': {reason}' if reason else ' on host 0'}")
  if not seen.all():
    hosts = ", ".join(str(i) for i in np.flatnonzero(seen == 0))
    raise UserError(
      f"--workdir={workdir} is not shared: host 0 wrote a file there that these hosts of {len(seen)} do not see:"
      f" {hosts}; give a folder that all hosts see, such as gs://BUCKET/RUN or one on NFS"
    )


def shows(look: Callable[[], bool]) -> bool:
  """Whether `look` finds what another host has written, in as many seconds as a shared file system may take."""
  deadline = time.monotonic() + _VISIBILITY
  while not look():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.2)
  return True


class PreemptionHandler:
  """SIGTERM, which announces a preemption, SIGHUP of a closed terminal, and Ctrl-C; and where all processes stop.

  Before `begin` there is nothing to save: each signal ends the process at once with code 75 or 130, also while its main
  thread compiles. The others end by a signal of their own, or as where a process dies. Afterwards a second Ctrl-C ends
  it at once, without a save. In a program that is no command, such as a notebook's kernel, Ctrl-C before `begin` is a
  KeyboardInterrupt, which ends the training and not the program.

  Every process calls `agreed` the same number of times, at points where it could stop; the answer is the same on all of
  them. With several processes it comes one call late, so that the host waits for no more than the step before the last.
  """

  def __init__(self, place: jax.sharding.Sharding):
    """`place`: of arrays of as many rows as there are devices, on which the processes have equally many rows."""
    self._place = place
    self._begun = self._is_guest = False
    self._asked = self._interrupts = 0  # the former a place in _CAUSES
    self._answer: jax.Array | None = None
    self._most = jax.jit(jnp.max)

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Take the signals, if this is the main thread."""
    self._is_guest = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # which commands replace
    with signals.Listener(self._on_signal, self._hear).listening():
      yield

  def begin(self) -> None:
    """From here on there is something to save: call it before the first step."""
    self._begun = True

  def agreed(self) -> type[Preempted] | None:
    """Why every process stops here: Preempted, or Interrupted, which comes first; None if they continue."""
    if jax.process_count() == 1:
      return _CAUSES[self._asked]
    answer, rows = self._answer, np.full(jax.device_count() // jax.process_count(), self._asked, np.int32)
    self._answer = self._most(jax.make_array_from_process_local_data(self._place, rows))
    return None if answer is None else _CAUSES[int(answer)]

  def raise_if_agreed(self) -> None:
    """Raises Preempted, or Interrupted, where `agreed`."""
    if cause := self.agreed():
      raise cause

  def _hear(self, number: int) -> None:
    if self._is_the_programs(number):
      return
    if not self._begun:
      logging.warning("asked to stop before the first step: nothing to save; the same command starts again")
      signals.exit_at_once(INTERRUPTED if number == signal.SIGINT else PREEMPTED)
    if number == signal.SIGINT:
      self._interrupts += 1
      if self._interrupts > 1:
        signals.end_interrupted()
      logging.warning("interrupted: the run saves and ends; a second Ctrl-C ends it at once, without a save")

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._is_the_programs(number):
      raise KeyboardInterrupt
    self._asked = max(self._asked, 2 if number == signal.SIGINT else 1)

  def _is_the_programs(self, number: int) -> bool:
    return self._is_guest and not self._begun and number == signal.SIGINT
