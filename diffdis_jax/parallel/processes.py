"""Let several processes of a run find each other, agree, and stop together.

A command calls `start` before it uses a device. The processes are found, in this order, by the flags
--coordinator_address, --num_processes and --process_id (or DIFFDIS_COORDINATOR_ADDRESS, ...), by Slurm's variables, or
on a Cloud TPU by a VM's metadata or GKE's variables. Otherwise there is one process.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import itertools
import json
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

from diffdis_jax.common import buckets, cli, signals
from diffdis_jax.errors import INTERRUPTED, PREEMPTED, Interrupted, Preempted, UserError

# Seconds after which a silent process counts as dead, and the others end. With buckets, a process may be silent longer.
HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_OVER_BUCKETS = 10, 100
WAIT = 3600  # seconds to wait for the other processes, which may still compile or write
_VISIBILITY = 30.0  # seconds within which a file of one host must be visible on the others
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
_CAUSES = (None, Preempted, Interrupted)  # causes to stop, by increasing precedence; None is no cause
_barriers = itertools.count()


def start() -> None:
  """Keep compiled programs, use all cores, and join the other processes of the run, if there are any.

  Raises:
    UserError: settings contradict each other, or a device is not available.
  """
  cli.compilation_cache()
  cli.use_all_cores()  # before the first device is asked for, which fixes their number
  values = flags.FLAGS.flag_values_dict()
  arguments = find(values, os.environ)
  if arguments is not None:
    folders = filter(None, (values.get("workdir"), values.get("out")))  # an ablation's runs are in its --out
    default = HEARTBEAT_TIMEOUT_OVER_BUCKETS if any(map(buckets.is_url, folders)) else HEARTBEAT_TIMEOUT
    _initialize(arguments, values["coordinator_timeout"], values["heartbeat_timeout"] or default)
    log_place()


def log_place() -> None:
  """Log the number of this host, and the devices."""
  host, devices = (jax.process_index(), jax.process_count()), (jax.local_device_count(), jax.device_count())
  logging.info("host %d of %d, %d of %d devices (%s)", *host, *devices, jax.devices()[0].device_kind)


def find(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Return the arguments of `jax.distributed.initialize`, from flags or the environment; None for one process.

  Raises:
    UserError: some of the three settings are missing, or settings contradict each other.
  """
  # The process's number may also come from an indexed Job of Kubernetes.
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
  # GKE's variables show a TPU, and so do a VM's device files; those of chips after v4 also exist for other devices.
  if (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu"):
    files = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if "TPU_WORKER_HOSTNAMES" in environ or (files and importlib.util.find_spec("libtpu")):
      return {}  # jax finds the settings itself
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
  """Return the settings of a Slurm step. A single task of a node takes all of its GPUs, where jax would take one. Each
  of several tasks takes the GPU with its number, or those that Slurm shows it."""
  one_a_node = environ["SLURM_STEP_NUM_TASKS"] == environ.get("SLURM_STEP_NUM_NODES")
  # Slurm 24.11 no longer sets the first variable.
  per_task = "SLURM_GPUS_PER_TASK" in environ or ":per_task:" in environ.get("SLURM_TRES_BIND", "")
  shows_own = one_a_node or per_task or re.fullmatch("[^,]+", environ.get("CUDA_VISIBLE_DEVICES", ""))
  return dict(
    num_processes=int(environ["SLURM_STEP_NUM_TASKS"]),
    process_id=int(environ["SLURM_PROCID"]),
    local_device_ids=() if shows_own else (int(environ["SLURM_LOCALID"]),),
    cluster_detection_method="slurm",
  )


def _initialize(arguments: Mapping[str, Any], timeout: int, heartbeat: int) -> None:
  """Wait for all processes. A timer ends this process before jax would abort with a stack trace."""
  address = f" by {arguments['coordinator_address']}" if "coordinator_address" in arguments else ""

  def give_up() -> None:
    sys.stderr.write(
      f"error: this process could not reach the others{address} within {timeout} seconds; the usual cause is that the"
      " command was not started on all hosts: start it on each of them, or give a longer --coordinator_timeout\n"
    )
    sys.stderr.flush()
    os._exit(1 if "DIFFDIS_LAUNCHED" in os.environ else 2)  # a launcher tries again after code 1, as after a dead host

  timer = threading.Timer(timeout, give_up)
  timer.daemon = True
  timer.start()
  # SIGTERM is handled here: jax's own service handles no other signal, and reaches agreement only at steps.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    **arguments,
    initialization_timeout=2 * timeout + 60,
    heartbeat_timeout_seconds=heartbeat,
    shutdown_timeout_seconds=WAIT,
  )
  jax.devices()  # every process waits here for the devices of the others
  timer.cancel()
  # Exchange values for the first time here, when all processes have just arrived: Gloo waits 30 s at its first exchange
  # between devices, and 30 minutes at later ones, such as Orbax's.
  barrier("start")
  from_first(gathered(np.int32(0)))
  # An error in a thread ends the process, like one in the main thread.
  threading.excepthook = lambda failed: sys.excepthook(failed.exc_type, failed.exc_value, failed.exc_traceback)  # pyright: ignore


def is_first() -> bool:
  """Return whether this process is the one that writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Wait until every process has reached this point."""
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost  # here, since it takes a second

    # Orbax's barrier uses the coordination service. multihost_utils.sync_global_devices is itself a program on the
    # devices, for whose compilation Gloo waits only 30 s. Each barrier needs a new name.
    key = f"diffdis/{next(_barriers)}/{name}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=WAIT * 1000)


def from_first(value: np.ndarray | np.generic) -> np.ndarray:
  """Return process 0's value on every process. Values have at most 32 bits."""
  return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def gathered(value: np.ndarray | np.generic) -> np.ndarray:
  """Gather the values of all processes along a new first axis. Values have at most 32 bits."""
  return np.asarray(multihost_utils.process_allgather(np.asarray(value), tiled=False))


def over_hosts(value: np.ndarray) -> np.ndarray:
  """Sum the counts of all processes."""
  return value if jax.process_count() == 1 else gathered(value.astype(np.int32)).sum(axis=0, dtype=value.dtype)


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
  """Return the whole of a global array on every process."""
  is_whole = getattr(array, "is_fully_addressable", True)
  return np.asarray(array if is_whole else multihost_utils.process_allgather(array, tiled=True))


def texts(text: str) -> list[str]:
  """Gather the texts of all processes, in the order of the processes."""
  own = np.frombuffer(text.encode(), np.uint8)
  longest = max(1, int(gathered(np.int32(len(own))).max()))
  rows = gathered(np.pad(own, (0, longest - len(own))))
  return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def first_message(message: str) -> str:
  """Return, on every process, the message of the first process that has one; empty if none has."""
  return message if jax.process_count() == 1 else next(filter(None, texts(message)), "")


def check_same(values: Mapping[str, Any], remedy: str) -> None:
  """Raise UserError on every process if a host has other values than host 0."""
  if jax.process_count() == 1:
    return
  mine = {name: repr(value) for name, value in values.items()}
  first = json.loads(texts(json.dumps(mine))[0])
  name = next((name for name in {**first, **mine} if first.get(name) != mine.get(name)), "")
  here = f"{name} is {first.get(name)} on host 0 and {mine.get(name)} on host {jax.process_index()}" if name else ""
  if message := first_message(here):
    raise UserError(f"{message}; {remedy}")


def on_first(action: Callable[[], Any]) -> None:
  """Run the action on process 0. If it raises a UserError, all processes raise one; if its code is not 2, process 0
  ends, and so do the others."""
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
  """Wait until `look` finds the file of another host, for as long as a shared file system may take."""
  deadline = time.monotonic() + _VISIBILITY
  while not look():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.2)
  return True


class PreemptionHandler:
  """Handle SIGTERM, which announces a preemption, SIGHUP and Ctrl-C, and agree on where all processes stop.

  Before `begin` there is nothing to save, so that each signal ends the process at once with code 75 or 130. Afterwards
  only a second Ctrl-C ends it at once, without a save. In a program that is no command, such as a notebook's kernel,
  Ctrl-C before `begin` raises KeyboardInterrupt.

  Every process calls `agreed` equally often, at points where it could stop, and gets the same answer. With several
  processes the answer is one call late, so that the host waits at most for the step before the last.
  jax's own agreement, multihost_utils.reached_preemption_sync_point, handles only SIGTERM, and only at steps.
  """

  def __init__(self, place: jax.sharding.Sharding):
    """Take `place`, a sharding that splits a row for each device, equally many for each process."""
    self._place = place
    self._begun = self._is_guest = False
    self._asked = self._interrupts = 0  # the first is an index of _CAUSES
    self._answer: jax.Array | None = None
    self._most = jax.jit(jnp.max)

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Handle the signals during the block, if this is the main thread."""
    self._is_guest = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # commands have another handler
    with signals.handled(self._hear):
      yield

  def begin(self) -> None:
    """Note that from now on there is something to save. Call it before the first step."""
    self._begun = True

  def agreed(self) -> type[Preempted] | None:
    """Return why all processes stop here, Preempted or Interrupted, which has precedence; None if they continue."""
    if jax.process_count() == 1:
      return _CAUSES[self._asked]
    answer, rows = self._answer, np.full(jax.device_count() // jax.process_count(), self._asked, np.int32)
    self._answer = self._most(jax.make_array_from_process_local_data(self._place, rows))
    return None if answer is None else _CAUSES[int(answer)]

  def raise_if_agreed(self) -> None:
    """Raise Preempted or Interrupted if `agreed` returns it."""
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
