"""Several processes as one run: how they find each other, agree, and stop together.

A command calls `start` before anything touches a device. The processes are found, in this order, by the flags
--coordinator_address, --num_processes and --process_id (or DIFFDIS_COORDINATOR_ADDRESS, ...), in a Slurm step, on a
Cloud TPU (a VM's metadata, or what GKE sets). Elsewhere there is one process.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from diffdis_jax.common import buckets, signals
from diffdis_jax.errors import INTERRUPTED, PREEMPTED, Interrupted, Preempted, UserError

# Seconds after which a silent process is dead, and the others end; longer where it may wait for a bucket in silence.
HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_OVER_BUCKETS = 10, 100
WAIT = 3600  # seconds that a process waits for the others, such as for one that compiles or still writes
_VISIBILITY = 30.0  # seconds in which a file of one host must show on the others
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
_CAUSES = (None, Preempted, Interrupted)  # to stop, the weightiest last; the first is none
_barriers = itertools.count()


def start() -> None:
  """Join the other processes of the run, and log which one this is and its devices. Alone, do nothing.

  Raises:
    UserError: contradicting settings, or a device that cannot be had.
  """
  values = flags.FLAGS.flag_values_dict()
  arguments = find(values, os.environ)
  if arguments is not None:
    folders = filter(None, (values.get("workdir"), values.get("out")))  # an ablation's runs are kept in its --out
    default = HEARTBEAT_TIMEOUT_OVER_BUCKETS if any(map(buckets.is_url, folders)) else HEARTBEAT_TIMEOUT
    _initialize(arguments, values["coordinator_timeout"], values["heartbeat_timeout"] or default)
    log_place()


def log_place() -> None:
  """Log which host this is, and the devices."""
  host, devices = (jax.process_index(), jax.process_count()), (jax.local_device_count(), jax.device_count())
  logging.info("host %d of %d, %d of %d devices (%s)", *host, *devices, jax.devices()[0].device_kind)


def find(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Return the arguments of `jax.distributed.initialize`, by flags or else by the environment; None for one process.

  Raises:
    UserError: some of the three settings, but not all; or settings that contradict each other.
  """
  # A process's number may also come from a Kubernetes Job with indices.
  numbers = ("DIFFDIS_PROCESS_ID", "JOB_COMPLETION_INDEX")
  variables = (("DIFFDIS_COORDINATOR_ADDRESS",), ("DIFFDIS_NUM_PROCESSES",), numbers)
  settings = [
    next((value for value in (given[name], *map(environ.get, names)) if value not in (None, "")), None)
    for name, names in zip(("coordinator_address", "num_processes", "process_id"), variables)
  ]
  if settings[0] or settings[1] or given["process_id"] is not None:
    return _explicit(*settings)
  if all(name in environ for name in _SLURM):
    return _slurm(environ) if int(environ["SLURM_STEP_NUM_TASKS"]) > 1 else None
  # A TPU is what GKE names, or a VM's device files: those of v4 and before, or later ones, which others have too.
  if (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu"):
    files = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if "TPU_WORKER_HOSTNAMES" in environ or (files and importlib.util.find_spec("libtpu")):
      return {}  # jax asks the machine
  return None


def _explicit(address: Any, num_processes: Any, process_id: Any) -> dict[str, Any] | None:
  if None in (address, num_processes, process_id):
    raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three of them")
  port = re.fullmatch(r".+:(\d{1,5})", address)
  if port is None or not 0 < int(port[1]) < 2**16:
    raise UserError(f"--coordinator_address={address} should be HOST:PORT, such as 10.0.0.1:8476")
  if not re.fullmatch(r"\d+ -?\d+", f"{num_processes} {process_id}"):
    raise UserError(f"--num_processes={num_processes} and --process_id={process_id} should be whole numbers")
  count, index = int(num_processes), int(process_id)
  if not 0 <= index < count:
    raise UserError(f"--process_id={index} should be from 0 to {count - 1}, since --num_processes={count}")
  arguments = dict(coordinator_address=address, num_processes=count, process_id=index, local_device_ids=())
  return arguments | {"cluster_detection_method": "deactivate"} if count > 1 else None


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
  """Read a Slurm step. One task a node has all of its GPUs, where jax would take one; of several, each has the one of
  its number, or those that Slurm shows it."""
  one_a_node = environ["SLURM_STEP_NUM_TASKS"] == environ.get("SLURM_STEP_NUM_NODES")
  # Slurm 24.11 has no longer the first.
  per_task = "SLURM_GPUS_PER_TASK" in environ or ":per_task:" in environ.get("SLURM_TRES_BIND", "")
  shows_own = one_a_node or per_task or re.fullmatch("[^,]+", environ.get("CUDA_VISIBLE_DEVICES", ""))
  return dict(
    num_processes=int(environ["SLURM_STEP_NUM_TASKS"]),
    process_id=int(environ["SLURM_PROCID"]),
    local_device_ids=() if shows_own else (int(environ["SLURM_LOCALID"]),),
    cluster_detection_method="slurm",
  )


def _initialize(arguments: Mapping[str, Any], timeout: int, heartbeat: int) -> None:
  """Wait for all processes. At its own timeout jax aborts, with a stack trace, so a timer comes first."""
  address = f" by {arguments['coordinator_address']}" if "coordinator_address" in arguments else ""

  def give_up() -> None:
    sys.stderr.write(
      f"error: this process could not reach the others{address} within {timeout} seconds; the usual cause is that the"
      " command was not started on all hosts: start it on each of them, or give a longer --coordinator_timeout\n"
    )
    sys.stderr.flush()
    os._exit(1 if "DIFFDIS_LAUNCHED" in os.environ else 2)  # a launcher tries again, as after a dead host

  timer = threading.Timer(timeout, give_up)
  timer.daemon = True
  timer.start()
  # SIGTERM is ours: jax's own service hears of no other signal, and asks for agreement at steps alone.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    **arguments,
    initialization_timeout=2 * timeout + 60,
    heartbeat_timeout_seconds=heartbeat,
    shutdown_timeout_seconds=WAIT,
  )
  jax.devices()  # every process waits here for the others' devices
  timer.cancel()
  # Host values first move here, where all have just come: at its first exchange between devices Gloo waits 30 s, and
  # for later ones, Orbax's among them, 30 minutes.
  barrier("start")
  from_first(gathered(np.int32(0)))
  # An error in a thread ends the process as one in the main thread does.
  threading.excepthook = lambda failed: sys.excepthook(failed.exc_type, failed.exc_value, failed.exc_traceback)  # pyright: ignore


def is_first() -> bool:
  """Tell whether this process is the one that writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Return when every process has come here."""
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost  # here, since it takes a second

    # Orbax asks the coordination service. multihost_utils.sync_global_devices is itself a program on the devices, to be
    # compiled, for which Gloo waits 30 s and no longer. A barrier's name must be new each time.
    key = f"diffdis/{next(_barriers)}/{name}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=WAIT * 1000)


def from_first(value: np.ndarray | np.generic) -> np.ndarray:
  """Return process 0's value, on every process. At most 32 bits wide."""
  return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def gathered(value: np.ndarray | np.generic) -> np.ndarray:
  """Gather every process's value along a new first axis. At most 32 bits wide."""
  return np.asarray(multihost_utils.process_allgather(np.asarray(value), tiled=False))


def over_hosts(value: np.ndarray) -> np.ndarray:
  """Sum every process's counts."""
  return value if jax.process_count() == 1 else gathered(value.astype(np.int32)).sum(axis=0, dtype=value.dtype)


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
  """Return a global array, on every process."""
  is_whole = getattr(array, "is_fully_addressable", True)
  return np.asarray(array if is_whole else multihost_utils.process_allgather(array, tiled=True))


def texts(text: str) -> list[str]:
  """Gather every process's text, in their order."""
  own = np.frombuffer(text.encode(), np.uint8)
  longest = max(1, int(gathered(np.int32(len(own))).max()))
  rows = gathered(np.pad(own, (0, longest - len(own))))
  return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def first_message(message: str) -> str:
  """Return the message of the first process that has one, on every process; empty where none has."""
  return message if jax.process_count() == 1 else next(filter(None, texts(message)), "")


def differing(value: str) -> list[int]:
  """List the processes that have another text than process 0, the same list on each."""
  first, *others = texts(value)
  return [i for i, other in enumerate(others, 1) if other != first]


def on_first(action: Callable[[], Any]) -> None:
  """Run the action on process 0. Raises UserError on every process if it raises that. One with another code than 2
  ends process 0, and so the others."""
  message = ""
  if is_first():
    try:
      action()
    except UserError as error:
      if error.code != UserError.code:
        raise
      message = str(error)
  if message := first_message(message):
    raise UserError(message)


def shows(look: Callable[[], bool]) -> bool:
  """Wait until `look` finds what another host has written, for as long as a shared file system may take."""
  deadline = time.monotonic() + _VISIBILITY
  while not look():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.2)
  return True


class PreemptionHandler:
  """Hears SIGTERM, which announces a preemption, SIGHUP and Ctrl-C, and agrees on where all processes stop.

  Before `begin` there is nothing to save: each signal ends the process at once with code 75 or 130. Afterwards a second
  Ctrl-C ends it at once, without a save. In a program that is no command, such as a notebook's kernel, Ctrl-C before
  `begin` is a KeyboardInterrupt.

  Every process calls `agreed` the same number of times, at points where it could stop; the answer is the same on all of
  them. With several processes it comes one call late, so that the host waits for no more than the step before the last.
  jax's own agreement, multihost_utils.reached_preemption_sync_point, knows SIGTERM alone, and is asked at steps alone.
  """

  def __init__(self, place: jax.sharding.Sharding):
    """`place` splits as many rows as there are devices, and gives each process equally many."""
    self._place = place
    self._begun = self._is_guest = False
    self._asked = self._interrupts = 0  # the former a place in _CAUSES
    self._answer: jax.Array | None = None
    self._most = jax.jit(jnp.max)

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Take the signals, if this is the main thread."""
    self._is_guest = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # which commands replace
    with signals.handled(self._hear):
      yield

  def begin(self) -> None:
    """Mark that there is something to save from here on: call it before the first step."""
    self._begun = True

  def agreed(self) -> type[Preempted] | None:
    """Return why every process stops here: Preempted, or Interrupted, which comes first; None if they continue."""
    if jax.process_count() == 1:
      return _CAUSES[self._asked]
    answer, rows = self._answer, np.full(jax.device_count() // jax.process_count(), self._asked, np.int32)
    self._answer = self._most(jax.make_array_from_process_local_data(self._place, rows))
    return None if answer is None else _CAUSES[int(answer)]

  def raise_if_agreed(self) -> None:
    """Raise Preempted, or Interrupted, where `agreed`."""
    if cause := self.agreed():
      raise cause

  def _hear(self, number: int) -> None:
    is_interrupt = number == signal.SIGINT
    if not self._begun:
      if self._is_guest and is_interrupt:
        raise KeyboardInterrupt
      signals.say("asked to stop before the first step: nothing to save; the same command starts again")
      signals.exit_at_once(INTERRUPTED if is_interrupt else PREEMPTED)
    if is_interrupt:
      self._interrupts += 1
      if self._interrupts > 1:
        signals.end_interrupted()
      signals.say("interrupted: the run saves and ends; a second Ctrl-C ends it at once, without a save")
    self._asked = max(self._asked, 2 if is_interrupt else 1)
