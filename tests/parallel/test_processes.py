from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest

from diffdis_jax.errors import Interrupted, Preempted, UserError
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import checkpoint
from diffdis_jax.structs import TrainState
from tests import command_runs, steps
from tests.command_runs import ROOT
from tests.interrupting import not_ignored

pytestmark = pytest.mark.slow

NOTHING = {"coordinator_address": None, "num_processes": None, "process_id": None}
SLURM = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "gpu[007-009,12],big1", "SLURM_STEP_NUM_TASKS": "5"}
SLURM |= {"SLURM_STEP_NUM_NODES": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"}
TWO_A_NODE = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
DIFFDIS = {"DIFFDIS_COORDINATOR_ADDRESS": "a:1", "DIFFDIS_NUM_PROCESSES": "4"}
FLAGS = {"coordinator_address": "b:2", "num_processes": 2, "process_id": 1}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
EXPLICIT = {"local_device_ids": (), "cluster_detection_method": "deactivate"}
OF_SLURM = dict(num_processes=5, process_id=3, local_device_ids=(), cluster_detection_method="slurm")


@pytest.mark.parametrize(
  "flags, environ, expected",
  [
    (NOTHING, {}, None),
    (NOTHING, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    (NOTHING, {"JOB_COMPLETION_INDEX": "0"}, None),
    (FLAGS | {"num_processes": 1, "process_id": 0}, {}, None),
    (FLAGS, DIFFDIS | SLURM, FLAGS | EXPLICIT),
    (NOTHING, DIFFDIS | {"DIFFDIS_PROCESS_ID": "3"}, dict(zip(FLAGS, ("a:1", 4, 3), strict=True)) | EXPLICIT),
    (NOTHING, DIFFDIS | {"JOB_COMPLETION_INDEX": "2"}, dict(zip(FLAGS, ("a:1", 4, 2), strict=True)) | EXPLICIT),
    (NOTHING, SLURM, OF_SLURM),
    # jax would give each task of a node a single GPU. Slurm shows each task its own GPUs as devices from 0 on.
    (NOTHING, TWO_A_NODE, OF_SLURM | {"local_device_ids": (1,)}),
    (NOTHING, TWO_A_NODE | {"CUDA_VISIBLE_DEVICES": "0,1"}, OF_SLURM | {"local_device_ids": (1,)}),
    (NOTHING, TWO_A_NODE | {"SLURM_GPUS_PER_TASK": "1"}, OF_SLURM),
    (NOTHING, TWO_A_NODE | {"CUDA_VISIBLE_DEVICES": "3"}, OF_SLURM),
    (NOTHING, TWO_A_NODE | {"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_TRES_BIND": "gres/gpu:per_task:2"}, OF_SLURM),
    (NOTHING, TPU, {}),
    (NOTHING, TPU | {"JAX_PLATFORMS": "cpu"}, None),
  ],
)
def test_processes_are_told_by_flags_or_the_environment(flags, environ, expected):
  assert processes.find(flags, environ) == expected


@pytest.mark.parametrize(
  "variables, message",
  [
    ({"process_id": 0}, "go together; give all three"),
    ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "should be HOST:PORT"),
    ({"coordinator_address": "a:65536", "num_processes": 2, "process_id": 0}, "should be HOST:PORT"),
    ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "should be from 0 to 1"),
    ({"coordinator_address": "a:1", "num_processes": "x", "process_id": 2}, "whole numbers"),
  ],
)
def test_bad_settings(variables, message):
  with pytest.raises(UserError, match=message):
    processes.find({**NOTHING, **variables}, {})


@pytest.mark.parametrize(
  "numbers, cause",
  [
    ([signal.SIGTERM], Preempted),
    ([signal.SIGHUP], Preempted),
    ([signal.SIGINT], Interrupted),
    ([signal.SIGINT, signal.SIGTERM], Interrupted),
  ],
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


VERB = """
import json, os, signal, sys, time, zlib
from absl import flags
import jax, numpy as np
from diffdis_jax.common import cli
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import restore, workdir
from diffdis_jax.training import start as start_of_run
from diffdis_jax.errors import UserError
from diffdis_jax.structs import TrainState

HOW = flags.DEFINE_string("how", "", "")
DEVICES = flags.DEFINE_integer("devices", 1, "")
SIGNAL = flags.DEFINE_string("signal", "SIGTERM", "")
WORKDIR = flags.DEFINE_string("workdir", "", "")


def main(_):
  os.environ["JAX_NUM_CPU_DEVICES"] = "set"  # or `start` would take one a core
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
    restored = restore.read_state(WORKDIR.value, 1, TrainState(params=params)).state.params
    assert {name: x.sharding for name, x in restored.items()} == places
    shards = {name: [np.asarray(shard.data) for shard in x.addressable_shards] for name, x in restored.items()}
    digests = {name: sorted({zlib.crc32(shard.tobytes()) for shard in shards[name]}) for name in "bcd"}
    sys.stdout.write(json.dumps({"last": float(processes.whole(restored["a"])[-1]), "digests": digests}) + "\\n")


if __name__ == "__main__":
  cli.process_flags()
  cli.run(main)
"""


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start(folder, index: int, port: int, *flags: str) -> subprocess.Popen[str]:
  if not (folder / "verb.py").exists():  # otherwise the previous process could find it empty
    (folder / "verb.py").write_text(VERB)
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  where = [f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
  verb = [str(folder / "verb.py")]
  with not_ignored():
    return command_runs.start([sys.executable, *verb, *where, *flags], env, folder=folder)


def run_two(folder, *flags: str) -> list[tuple[int, str, str]]:
  """Run two processes; return the exit code, stdout and stderr of each."""
  port = free_port()
  processes = [start(folder, i, port, *flags) for i in range(2)]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_two_processes_agree_and_share(tmp_path):
  results = run_two(tmp_path, "--how=agree", f"--workdir={tmp_path / 'run'}", "--devices=4")
  assert [code for code, _, _ in results] == [0, 0], "\n".join(err for _, _, err in results)
  assert all(f"host {i} of 2, 4 of 8 devices (cpu)" in err for i, (_, _, err) in enumerate(results))


def test_two_processes_restore_every_bit_and_both_refuse_a_damaged_file(tmp_path):
  array = np.random.default_rng(0).normal(size=1 << 19).astype(np.float32)
  array[:3] = -0.0, np.inf, np.uint32(0x7FC12345).view(np.float32)
  params = {"a": array, "b": -array, "c": array.astype(jax.numpy.bfloat16), "d": array[:9]}
  with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
    checkpointer.save(1, TrainState(params=jax.device_put(params)))
  expected = {"last": float(array[-1]), "digests": {name: [zlib.crc32(params[name].tobytes())] for name in "bcd"}}
  for code, out, err in run_two(tmp_path, "--how=restore", f"--workdir={tmp_path / 'run'}"):
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == expected
  large = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size > 1 << 19)
  file = min(large, key=lambda path: path.stat().st_size)  # it holds c, which takes half of the bytes
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  for code, out, err in run_two(tmp_path, "--how=restore", f"--workdir={tmp_path / 'run'}"):
    assert code == 2 and "digests" not in out, err
    line = err.splitlines()[-1]
    assert line.startswith("error: checkpoint ") and f"{file.name} holds other bytes than were saved; " in line


def test_one_raises_and_all_end_at_once_with_its_error_shown(tmp_path):
  """The other processes end within the heartbeat's time; without it they would wait an hour."""
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
  results = run_two(tmp_path, "--how=stop", f"--signal={name}", "--devices=2")
  assert [own for own, _, _ in results] == [code, code], results
  assert not any("Traceback" in err for _, _, err in results)
  assert [out.splitlines()[-1] for _, out, _ in results] == ["stopped at 6", "stopped at 6"]


def test_a_workdir_that_hosts_do_not_share(tmp_path):
  for code, _, err in run_two(tmp_path, "--how=share", f"--workdir={tmp_path / 'run'}"):
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "is not shared" in line and "host 1 does not see a file" in line


@pytest.mark.parametrize("index, launched, code", [(0, "", 2), (1, "1", 1)])
def test_a_process_left_alone_says_why_and_exits(tmp_path, monkeypatch, index, launched, code):
  if launched:
    monkeypatch.setenv("DIFFDIS_LAUNCHED", launched)
  process = start(tmp_path, index, free_port(), "--coordinator_timeout=2")
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  assert err.startswith("error: this process could not reach the others by localhost:") and err.count("\n") == 1
  assert "within 2 seconds" in err and "not started on all hosts" in err
