"""Run a real Slurm on this machine: munged, slurmctld and slurmd run as root in a folder of their own.

They come from Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from tests.command_runs import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CPUS = 4  # so that two tasks fit on any machine: Slurm believes this number
_CONFIG = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
SlurmdParameters=config_overrides
KillWait=20
MessageTimeout=10
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES PriorityTier=1 GraceTime=60 OverTimeLimit=0 State=UP
PartitionName=high Nodes={host} PriorityTier=10 State=UP
"""


class Slurm:
  """A cluster of one node with two partitions; jobs of one partition preempt jobs of the other."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    self._munged: subprocess.Popen[bytes] | None = None

  def start(self) -> None:
    folder, host = self.folder, socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
      (folder / name).mkdir()
    ports = [_free_port(), _free_port()]
    (folder / "slurm.conf").write_text(_CONFIG.format(host=host, folder=folder, ports=ports, cpus=CPUS))
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    # --force, since a test's folder is below /tmp, where other users may write.
    self._munged = subprocess.Popen(
      ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
      + [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: (folder / "munge.socket").exists(), 20, "munged")
    # An absolute path: srun in a job would not find a relative one.
    subprocess.run(["slurmctld", "-f", str(folder / "slurm.conf")], check=True, env=self.environment)
    self.start_node()

  def start_node(self) -> None:
    subprocess.run(["slurmd", "-f", str(self.folder / "slurm.conf")], check=True, env=self.environment)
    wait_until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T"), 60, "the node")

  def kill_node(self, workdir: pathlib.Path) -> None:
    """Kill the daemon and all its processes at once, as a power failure would."""
    for pattern in (str(self.folder / "slurm.conf"), "slurmstepd", str(workdir)):
      for pid in pids(pattern):
        if "slurmctld" not in command_of(pid):
          os.kill(pid, signal.SIGKILL)

  def stop(self) -> None:
    for name in ("slurmd", "slurmctld"):
      file = self.folder / f"{name}.pid"
      if file.exists() and file.read_text().strip():
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(file.read_text()), signal.SIGKILL)
    if self._munged is not None:
      self._munged.kill()
      self._munged.wait()

  def run(self, *command: str) -> str:
    """Run a command of Slurm and return its output."""
    done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()

  def submit(self, environment: dict[str, str], *flags: str, command: list[str], script: str = "slurm.sbatch") -> str:
    """Submit a job and return its number."""
    arguments = ["sbatch", "--parsable", f"--output={self.folder}/%j.log", *flags, f"launch/{script}", "--", *command]
    # DELAY=0: the launcher does not wait between a crash and the next start.
    variables = {**environment, "SLURM_CONF": self.environment["SLURM_CONF"], "DELAY": "0"}
    done = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split(";")[0]

  def facts(self, job: str) -> dict[str, str]:
    """Return what Slurm shows of a job."""
    output = self.run("scontrol", "show", "job", job)
    return dict(word.split("=", 1) for word in output.split() if "=" in word)

  def hasten(self, job: str) -> None:
    """Start a requeued job at once. Slurm would wait for two minutes, in case the node is bad."""
    wait_until(lambda: self.facts(job)["JobState"] == "PENDING", 90, f"job {job} queued again")
    time.sleep(10)  # for a moment the node refuses a job that it has just killed
    self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

  def log(self, job: str) -> str:
    """Return the output of all starts of a job."""
    return (self.folder / f"{job}.log").read_text()

  def wait_for_end(self, job: str, seconds: float = 180) -> dict[str, str]:
    """Wait until the job will not run again, and return its facts."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
    wait_until(lambda: self.facts(job)["JobState"] in ended, seconds, f"the end of job {job}")
    return self.facts(job)


def wait_until(ready: Callable[[], Any], seconds: float, event: str) -> None:
  deadline = time.monotonic() + seconds
  while not ready():
    assert time.monotonic() < deadline, f"no {event} after {seconds:.0f} seconds"
    time.sleep(0.1)


def pids(text: str) -> list[int]:
  """Return the ids of all other processes whose command line contains the text."""
  numbers = (int(path.name) for path in pathlib.Path("/proc").iterdir() if path.name.isdigit())
  return [pid for pid in numbers if pid != os.getpid() and text in command_of(pid)]


def command_of(pid: int) -> str:
  """Return the command line of a process, or nothing if it has ended."""
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
  except OSError:
    return ""


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]
