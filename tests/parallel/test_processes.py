from __future__ import annotations

import errno
import fnmatch
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import zlib
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from diffdis_jax.errors import Interrupted, Preempted, UserError
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import checkpoint, lock
from diffdis_jax.structs import TrainState
from tests import command_runs, steps
from tests.command_runs import ROOT
from tests.interrupting import not_ignored

pytestmark = pytest.mark.slow

NOTHING = {"coordinator_address": None, "num_processes": None, "process_id": None}
SLURM = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "gpu[007-009,12],big1", "SLURM_STEP_NUM_TASKS": "5"}
SLURM |= {"SLURM_STEP_NUM_NODES": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"}


def explicit(address: str, count: int, index: int) -> dict[str, Any]:
  found = dict(coordinator_address=address, num_processes=count, process_id=index, local_device_ids=())
  return found | {"cluster_detection_method": "deactivate"}


DIFFDIS = {"DIFFDIS_COORDINATOR_ADDRESS": "a:1", "DIFFDIS_NUM_PROCESSES": "4"}


def test_one_process_where_nothing_tells_of_more():
  assert processes.find(NOTHING, {}) is None
  assert processes.find(NOTHING, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
  assert processes.find(NOTHING, {"JOB_COMPLETION_INDEX": "0"}) is None
  assert processes.find({"coordinator_address": "a:1", "num_processes": 1, "process_id": 0}, {}) is None


def test_flags_come_before_the_environment():
  flags = {"coordinator_address": "b:2", "num_processes": 2, "process_id": 1}
  assert processes.find(flags, DIFFDIS | SLURM) == explicit("b:2", 2, 1)
  assert processes.find(NOTHING, {**DIFFDIS, "DIFFDIS_PROCESS_ID": "3"}) == explicit("a:1", 4, 3)
  assert processes.find(NOTHING, {**DIFFDIS, "JOB_COMPLETION_INDEX": "2"}) == explicit("a:1", 4, 2)


def test_slurm():
  """jax asks Slurm for the coordinator, and would give each task of a node a single GPU."""
  assert processes.find(NOTHING, SLURM) == dict(
    num_processes=5, process_id=3, local_device_ids=(), cluster_detection_method="slurm"
  )
  several = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
  assert processes.find(NOTHING, several)["local_device_ids"] == (1,)
  # Slurm shows a task the GPUs that it has, as devices from 0 on. 24.11 says so by how it binds them.
  of_two = {"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_TRES_BIND": "gres/gpu:per_task:2"}
  for bound in ({"SLURM_GPUS_PER_TASK": "1"}, {"CUDA_VISIBLE_DEVICES": "3"}, of_two):
    assert processes.find(NOTHING, several | bound)["local_device_ids"] == ()
  for all_shown in ({}, {"SLURM_TRES_BIND": "gres/gpu:none"}):
    assert processes.find(NOTHING, several | {"CUDA_VISIBLE_DEVICES": "0,1"} | all_shown)["local_device_ids"] == (1,)


@pytest.mark.parametrize(
  "given, expected",
  [
    ({"workdir": "gs://bucket/a"}, 100),
    ({"out": "gs://bucket/ablations"}, 100),  # of `ablate run`, which has no --workdir
    ({"workdir": "a", "out": "b.json"}, 10),
    ({"workdir": "gs://bucket/a", "heartbeat_timeout": 7}, 7),
  ],
)
def test_each_command_says_where_its_run_is_kept(monkeypatch, given, expected):
  values = {"coordinator_timeout": 300, "heartbeat_timeout": None, **NOTHING, **given}
  monkeypatch.setattr(processes.flags, "FLAGS", types.SimpleNamespace(flag_values_dict=lambda: values))
  monkeypatch.setattr(processes, "find", lambda flags, environ: {})
  monkeypatch.setattr(processes, "log_place", lambda: None)
  asked = []
  monkeypatch.setattr(processes, "_initialize", lambda found, timeout, heartbeat: asked.append(heartbeat))
  processes.start()
  assert asked == [expected]


def test_a_tpu_is_asked_for_its_own_environment():
  environ = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
  assert processes.find(NOTHING, environ) == {}
  assert processes.find(NOTHING, environ | {"JAX_PLATFORMS": "cpu"}) is None
  assert processes.find(NOTHING, environ | {"JAX_PLATFORMS": ""}) == {}, "as jax takes it"


@pytest.mark.parametrize(
  "files, libtpu, found",
  [
    (["/dev/accel0"], True, {}),
    (["/dev/vfio/0", "/dev/vfio/1"], True, {}),
    (["/dev/vfio/0"], False, None),
    ([], True, None),
  ],
)
def test_a_tpu_vm_is_known_by_its_devices(monkeypatch, files, libtpu, found):
  monkeypatch.setattr(processes.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
  monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object() if libtpu else None)
  assert processes.find(NOTHING, {}) == found


@pytest.mark.parametrize(
  "given, message",
  [
    ({"coordinator_address": "a:1"}, "go together; give all three"),
    ({"process_id": 0}, "go together; give all three"),
    ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "should be HOST:PORT"),
    ({"coordinator_address": "a:99999999", "num_processes": 2, "process_id": 0}, "should be HOST:PORT"),
    ({"coordinator_address": "a:65536", "num_processes": 2, "process_id": 0}, "should be HOST:PORT"),
    ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "should be from 0 to 1"),
    ({"coordinator_address": "a:1", "num_processes": "x", "process_id": 2}, "whole numbers"),
  ],
)
def test_bad_settings(given, message):
  with pytest.raises(UserError, match=message):
    processes.find({**NOTHING, **given}, {})


@pytest.mark.parametrize(
  "numbers, cause",
  [([signal.SIGTERM], Preempted), ([signal.SIGINT], Interrupted), ([signal.SIGINT, signal.SIGTERM], Interrupted)],
)
def test_a_signal_stops_a_single_process(numbers, cause):
  stop = processes.PreemptionHandler(sharding.batch_sharding(steps.make_mesh()))
  with not_ignored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop.listening():
      stop.begin()
      assert not stop.agreed()
      for number in numbers:
        os.kill(os.getpid(), number)
      assert stop.agreed() is cause
      with pytest.raises(Preempted) as error:
        stop.raise_if_agreed()
      assert error.type is cause and cause.code == (75 if cause is Preempted else 130)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_before_the_first_step_ctrl_c_ends_no_program_that_is_no_command():
  """Such as a notebook's kernel, which has the results of earlier cells."""
  stop = processes.PreemptionHandler(sharding.batch_sharding(steps.make_mesh()))
  with not_ignored():
    with pytest.raises(KeyboardInterrupt), stop.listening():
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(5)
    time.sleep(0.2)  # in which the thread that hears of it would end this process
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


VERB = """
import json, os, signal, sys, time, zlib
from absl import flags
import jax, numpy as np
from jax import monitoring
from orbax import checkpoint as ocp
from diffdis_jax.common import cli, storage
from diffdis_jax.parallel import processes, programs, sharding
from diffdis_jax.run import restore, workdir
from diffdis_jax.training import start as start_of_run
from diffdis_jax.errors import UserError
from diffdis_jax.structs import TrainState

HOW = flags.DEFINE_string("how", "", "")
DEVICES = flags.DEFINE_integer("devices", 1, "")
SIGNAL = flags.DEFINE_string("signal", "SIGTERM", "")
WORKDIR = flags.DEFINE_string("workdir", "", "")


def main(_):
  cli.compilation_cache()
  jax.config.update("jax_num_cpu_devices", DEVICES.value)
  processes.start()
  first = processes.is_first()
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  if HOW.value == "raise":
    if not first:
      raise RuntimeError("the first error")
    processes.barrier("never")
  if HOW.value == "stop":
    stop = processes.PreemptionHandler(sharding.batch_sharding(mesh))
    with stop.listening():
      stop.begin()
      for step in range(200):
        if step == 5 and not first:
          os.kill(os.getpid(), getattr(signal, SIGNAL.value))
        if cause := stop.agreed():
          sys.stdout.write(f"stopped at {step}\\n")
          raise cause
  if HOW.value in ("early", "twice"):
    stop = processes.PreemptionHandler(sharding.batch_sharding(mesh))
    with stop.listening():
      if HOW.value == "twice":
        stop.begin()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        sys.stderr.write("still there\\n")
      os.kill(os.getpid(), getattr(signal, SIGNAL.value))
      time.sleep(60)
  if HOW.value == "compile":
    hits = []
    monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)

    traced = []

    def triple(x):
      time.sleep(0 if first else 2)  # the second one is slow to compile it
      traced.append(time.time())
      return x.sum() * 3

    rows = sharding.to_global({"x": np.ones(1, np.float32)}, mesh)["x"]
    total = programs.AheadOfTime("the sum", jax.jit(triple).lower(rows)).compiled()
    now = time.time()
    said = {"traced": traced[0], "compiled": now, "sum": float(total(rows)), "hits": len(hits)}
    sys.stdout.write(json.dumps(said) + "\\n")
  if HOW.value == "share":
    processes._VISIBILITY = 1.0
    processes.on_first(lambda: workdir.open_for_training(WORKDIR.value, {}))
    start_of_run.check_shared(WORKDIR.value if first else WORKDIR.value + "_of_another_host")
  if HOW.value == "agree":
    rows = np.arange(16, dtype=np.int32)
    for shape in ((4, 2, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4)):
      mesh = sharding.make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2])
      own = rows[sharding.local_rows(mesh, 16)]
      placed = sharding.to_global({"x": own}, mesh)["x"]
      np.testing.assert_array_equal(processes.whole(placed), rows)
    assert processes.over_hosts(np.array([jax.process_index() + 1, 5])).tolist() == [3, 10]
    assert processes.from_first(np.float32(7 - jax.process_index())) == 7
    assert processes.first_message("" if first else "of the second") == "of the second"
    assert processes.first_message("") == ""
    processes.on_first(lambda: workdir.open_for_training(WORKDIR.value, {}))
    start_of_run.check_shared(WORKDIR.value)
    assert processes.texts("é" * (1 + jax.process_index())) == ["é", "éé"]
  if HOW.value == "restore":
    split, whole = sharding.batch_sharding(mesh), jax.sharding.NamedSharding(mesh, sharding.REPLICATED)
    places = {"a": split, "b": whole, "c": whole, "d": whole}
    saved = restore.saved_params(WORKDIR.value)
    params = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in saved.items()}
    read, deserialize = [], ocp.type_handlers.ArrayHandler.deserialize

    def counted(self, infos, args=None):
      read.extend(info.name for info in infos)
      return deserialize(self, infos, args)

    ocp.type_handlers.ArrayHandler.deserialize = counted
    if not first:  # its storage is away for a moment, when it has read some of it
      storage.PAUSE, read_json, tried = 0.1, ocp.JsonCheckpointHandler.restore, []

      def wavering(self, *args, **kwargs):
        tried.append(self)
        if len(tried) == 1:
          raise ConnectionError("away")
        return read_json(self, *args, **kwargs)

      ocp.JsonCheckpointHandler.restore = wavering
    resumed = restore.read_state(WORKDIR.value, 1, TrainState(params=params))
    assert resumed.meta["step"] == 1
    said = []
    for found in (resumed.state.params, restore.restore_params(WORKDIR.value, abstract=params)):
      assert {name: x.sharding for name, x in found.items()} == places
      shards = {name: [np.asarray(shard.data) for shard in x.addressable_shards] for name, x in found.items()}
      digests = {name: sorted({zlib.crc32(each.tobytes()) for each in shards[name]}) for name in "bcd"}
      said.append({"last": float(processes.whole(found["a"])[-1]), "digests": digests})
    assert said[0] == said[1]
    sys.stdout.write(json.dumps({"read": sorted({*read}), **said[0]}) + "\\n")


if __name__ == "__main__":
  cli.process_flags()
  cli.run(main)
"""


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start(folder, index: int, port: int, *flags: str, processes: int = 2) -> subprocess.Popen[str]:
  if not (folder / "verb.py").exists():  # or the process before would find it empty
    (folder / "verb.py").write_text(VERB)
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  where = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={index}"]
  verb = [str(folder / "verb.py")]
  with not_ignored():
    return command_runs.start([sys.executable, *verb, *where, *flags], env, folder=folder)


def both(folder, *flags: str) -> list[tuple[int, str, str]]:
  """Exit code, stdout and stderr of each of two processes."""
  port = free_port()
  processes = [start(folder, i, port, *flags) for i in range(2)]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_two_processes_agree_and_share(tmp_path):
  results = both(tmp_path, "--how=agree", f"--workdir={tmp_path / 'run'}", "--devices=4")
  assert [code for code, _, _ in results] == [0, 0], "\n".join(err for _, _, err in results)
  assert all(f"host {i} of 2, 4 of 8 devices (cpu)" in err for i, (_, _, err) in enumerate(results))


def test_two_processes_restore_what_each_needs(tmp_path):
  """Every bit of it, also where one of them has to read again; and where one of them alone reads what is damaged, both
  say so in the same line."""
  array = np.random.default_rng(0).normal(size=1 << 19).astype(np.float32)
  array[:3] = -0.0, np.inf, np.uint32(0x7FC12345).view(np.float32)
  params = {"a": array, "b": -array, "c": array.astype(jax.numpy.bfloat16), "d": array[:9]}
  with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
    checkpointer.save(1, TrainState(params=jax.device_put(params)))
  expected = {name: [zlib.crc32(params[name].tobytes())] for name in "bcd"}
  read = []
  for code, out, err in both(tmp_path, "--how=restore", f"--workdir={tmp_path / 'run'}"):
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["last"] == float(array[-1]) and found["digests"] == expected
    read.append(found["read"])
  assert read == [[*"abcd"]] * 2
  large = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size > 1 << 19)
  file = min(large, key=lambda path: path.stat().st_size)  # of c, which takes half the bytes
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  for code, out, err in both(tmp_path, "--how=restore", f"--workdir={tmp_path / 'run'}"):
    assert code == 2 and "digests" not in out, err
    line = err.splitlines()[-1]
    assert line.startswith("error: checkpoint ") and f"{file.name} holds other bytes than were saved; " in line


def test_one_raises_and_all_end_at_once_with_its_error_shown(tmp_path):
  """Within the time that they are given: without it, the one would wait an hour for the other."""
  port = free_port()
  first, second = (start(tmp_path, i, port, "--how=raise", "--heartbeat_timeout=5") for i in range(2))
  try:
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1 and "RuntimeError: the first error" in err
    first.communicate(timeout=60)
    assert first.returncode != 0
  finally:
    first.kill()


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path, name, code):
  results = both(tmp_path, "--how=stop", f"--signal={name}", "--devices=2")
  assert [each for each, _, _ in results] == [code, code], results
  assert not any("Traceback" in err for _, _, err in results)
  assert [out.splitlines()[-1] for _, out, _ in results] == ["stopped at 6", "stopped at 6"]


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGINT", 130)])
def test_before_there_is_anything_to_save_a_signal_ends_it_at_once(tmp_path, name, code):
  process = start(tmp_path, 0, free_port(), "--how=early", f"--signal={name}", processes=1)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code and "before the first step" in err and "Traceback" not in err


def test_a_second_ctrl_c_ends_it_without_a_save(tmp_path):
  process = start(tmp_path, 0, free_port(), "--how=twice", "--signal=SIGINT", processes=1)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130
  first, second, third = (line.split("] ")[-1] for line in err.splitlines()[-3:])
  assert first.startswith("interrupted: the run saves and ends; a second Ctrl-C ends it at once")
  assert (second, third) == ("still there", "interrupted")


def test_a_program_runs_when_the_slowest_has_compiled_it_and_the_first_finds_it_again(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  for hits in (0, 1):
    results = both(tmp_path, "--how=compile")
    assert [code for code, _, _ in results] == [0, 0], results
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    assert second["traced"] < first["compiled"]
    assert first["sum"] == second["sum"] == 6
    assert [first["hits"], second["hits"]] == [hits, 0], "on CPUs jax keeps what process 0 compiled"


def test_a_workdir_that_hosts_do_not_share(tmp_path):
  for code, _, err in both(tmp_path, "--how=share", f"--workdir={tmp_path / 'run'}"):
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "is not shared" in line and "host 1 does not see a file" in line


def test_a_workdir_that_cannot_be_written_now_is_no_bad_input(tmp_path, monkeypatch):
  def away(path, **_):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

  monkeypatch.setattr(type(epath.Path(tmp_path)), "mkdir", away)
  with pytest.raises(OSError, match="Stale file handle"):
    lock.Lock(tmp_path / "run").__enter__()


@pytest.mark.parametrize("index, launched, code", [(0, "", 2), (1, "", 2), (1, "1", 1)])
def test_a_process_left_alone_says_why_and_exits(tmp_path, monkeypatch, index, launched, code):
  if launched:
    monkeypatch.setenv("DIFFDIS_LAUNCHED", launched)
  process = start(tmp_path, index, free_port(), "--coordinator_timeout=2")
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  assert err.startswith("error: this process could not reach the others by localhost:") and err.count("\n") == 1
  assert "within 2 seconds" in err and "not started on all hosts" in err


def test_rows_of_a_single_process_are_all_of_them():
  assert sharding.local_rows(steps.make_mesh(2, 2, 2), 16) == list(range(16))
  assert processes.over_hosts(np.array([2])).tolist() == [2] and jax.process_count() == 1
