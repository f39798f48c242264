"""Commands of the package, run as `subprocess` runs them, but without two seconds of imports each.

A server, one a process of the tests and environment, has imported the libraries of a command with a network, and
nothing of the package. It forks a process for each command, which continues as `python -m diffdis_jax.COMMAND` does and
becomes a child of the tests' own process: its number, signals, exit code and pipes are `subprocess`'s.

What differs from a process of its own: the libraries are there already, also those that this command would not import;
the commands of one server have one seed of `hash`; /proc shows the server's command line. tests/test_forked.py holds
that the rest is alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import io
import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# With a network. The others import little, and that they do so without jax is part of what they are.
_NAMES = ("train", "evaluate", "generate", "import_weights", "export_weights", "preflight", "ablate")
COMMANDS = tuple(f"diffdis_jax.{name}" for name in _NAMES)
LIBRARIES = (
  *("absl.app", "absl.logging", "clu.parameter_overview", "einops", "etils.epath", "flax.nnx", "ftfy", "grain", "jax"),
  *("jax.experimental.multihost_utils", "jax.experimental.pallas.tpu", "jaxtyping", "ml_collections.config_flags"),
  *("optax", "orbax.checkpoint", "PIL.Image", "safetensors.numpy", "tokenizers"),
)
# Variables that none of them reads while it is imported. With another value of any other, it is another server.
READ_LATER = (
  *("DIFFDIS_COORDINATOR_ADDRESS", "DIFFDIS_LAUNCHED", "DIFFDIS_NUM_PROCESSES", "DIFFDIS_PROCESS_ID"),
  *("PYTEST_CURRENT_TEST", "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "XDG_CACHE_HOME"),
)
MOST_SERVERS = 2  # at a time, of a process of the tests: each has some 200 MB
_SERVE = "__import__('tests.forked').forked.main()"  # which leaves no name in `__main__`
_LONGEST = 200_000  # bytes of a command with its environment
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, of prctl
_servers: dict[frozenset[tuple[str, str]], Server] = {}  # the one that was asked last is the last
_lock = threading.Lock()


def run(
  command: Sequence[str], environment: Mapping[str, str], *, timeout: float = 600, **where: Any
) -> subprocess.CompletedProcess[str]:
  """As `subprocess.run`, with what it writes as text. `where`: of `start`."""
  with start(command, environment, **where) as process:
    try:
      out, err = process.communicate(timeout=timeout)
    except BaseException:
      process.kill()
      raise
  return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(
  command: Sequence[str],
  environment: Mapping[str, str],
  *,
  folder: pathlib.Path = ROOT,
  modules: Collection[str] = COMMANDS,
  output: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
  """As `subprocess.Popen`, with nothing to read, and pipes of text.

  Args:
    command: forked, where it is Python with -m and one of `modules`; another is a process of its own.
    environment: its variables.
    folder: where it is.
    modules: that import jax.
    output: of stdout and stderr; DEVNULL where nobody reads them.
  """
  named = list(command[:2]) == [sys.executable, "-m"] and command[2] in modules
  known = sys.platform == "linux" and hasattr(subprocess.Popen, "_execute_child")
  return (Forked if named and known else subprocess.Popen)(
    command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True
  )


def end_servers() -> None:
  """At the end of the tests."""
  while _servers:
    _servers.popitem()[1].end()


class Forked(subprocess.Popen):
  """Python with -m, of which all three streams are given, and the folder."""

  def _execute_child(self, *values: Any) -> None:
    start: Any = super()
    given = inspect.signature(start._execute_child).bind(*values).arguments
    pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
    request = [*given["args"], str(given["cwd"]), {**given["env"]}]
    with _lock:
      server = server_of(given["env"])
      if server.refusal:
        return start._execute_child(*values)
      self.pid = server.fork(request, [pipes[0], pipes[3], pipes[5]])
    self._child_created = True
    start._close_pipe_fds(*pipes)


def server_of(environment: Mapping[str, str]) -> Server:
  """The one that was started with these variables, now or before."""
  key = frozenset((name, value) for name, value in environment.items() if name not in READ_LATER)
  if key in _servers:
    server = _servers.pop(key)
  else:
    while len(_servers) >= MOST_SERVERS:
      _servers.pop(next(iter(_servers))).end()
    server = Server(environment)
  _servers[key] = server
  return server


class Server:
  """The tests' end of one.

  Attributes:
    refusal: why it forks nothing: its libraries have started a thread, or said what each command has to say itself.
  """

  def __init__(self, environment: Mapping[str, str]):
    self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, tempfile.TemporaryFile() as said:
      number = theirs.fileno()
      options: Any = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, "pass_fds": [number]}
      command = [sys.executable, "-c", _SERVE, str(number), *LIBRARIES]
      self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
      theirs.close()  # so that its end is heard
      answer = self._connection.recv(10_000).decode()
      said.seek(0)
      self.refusal = "" if answer == "ready" else answer or f"it has ended: {said.read().decode()}"

  def fork(self, request: Sequence[Any], descriptors: Sequence[int]) -> int:
    """The number of the new process, which is a child of this one. `request`: its words, its folder, its variables."""
    with _adopting():
      socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors)
      return int(self._connection.recv(100))

  def end(self) -> None:
    self._connection.close()
    self.process.wait()


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
  """Who has lost its parent becomes this process's child."""
  _set_adopts(True)
  try:
    yield
  finally:
    _set_adopts(False)


def _set_adopts(on: bool) -> None:
  if ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, int(on), 0, 0, 0):
    raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
  """Of a server, and of the processes that it forks."""
  continue_as(*serve())


def serve() -> tuple[list[Any], list[int]]:
  """In the server: until the tests' end is closed. In each of the processes that it forks: what is asked for."""
  connection, tests = socket.socket(fileno=int(sys.argv[1])), os.getppid()
  for library in sys.argv[2:]:
    importlib.import_module(library)
  if not (first := os.fork()):  # before which numpy's OpenBLAS ends its threads, until they are needed
    os._exit(0)
  os.waitpid(first, 0)
  threads, said = os.listdir("/proc/self/task"), os.pread(2, 5000, 0).decode()
  if said or len(threads) > 1:
    connection.send(f"its libraries have {len(threads)} threads, and say: {said}".encode())
    os._exit(1)
  gc.freeze()  # so that no process copies what it only looks at
  connection.send(b"ready")
  while True:
    message, descriptors = _received(connection, tests)
    reader, writer = os.pipe()
    between = os.fork()
    if not between:
      between = os.getpid()
      if number := os.fork():
        os.write(writer, str(number).encode())
        os._exit(0)  # and the tests' process is the parent
      while os.getppid() == between:
        time.sleep(0.001)
      for descriptor in (reader, writer, connection.detach()):
        os.close(descriptor)
      return json.loads(message), descriptors
    os.waitpid(between, 0)
    connection.send(os.read(reader, 100))
    for descriptor in (reader, writer, *descriptors):
      os.close(descriptor)


def _received(connection: socket.socket, tests: int) -> tuple[bytes, list[int]]:
  """The next request. Ends this process where there will be none, even if another one has the tests' end too."""
  connection.settimeout(5)
  while os.getppid() == tests:
    with contextlib.suppress(TimeoutError):
      message, descriptors, *_ = socket.recv_fds(connection, _LONGEST, 3)
      if not message:
        break
      return message, descriptors
  os._exit(0)


def continue_as(request: list[Any], descriptors: Sequence[int]) -> None:
  """Runs the command in this process, as Python does that was started so."""
  *command, folder, environment = request
  for number, descriptor in enumerate(descriptors):
    os.dup2(descriptor, number)
    os.close(descriptor)
  # The server's is of a file, and would seek in what may be a pipe.
  was: Any = sys.stdout
  binary: Any = open(1, "wb", buffering=0 if was.write_through else -1, closefd=False)
  sys.stdout = sys.__stdout__ = io.TextIOWrapper(
    binary, was.encoding, was.errors, newline="\n", line_buffering=was.line_buffering, write_through=was.write_through
  )
  for name in READ_LATER:  # the others are the server's, and what its libraries have made of them
    if name in environment:
      os.environ[name] = environment[name]
    else:
      os.environ.pop(name, None)
  sys.argv[:] = ["-m", *command[3:]]
  sys.orig_argv[:] = command
  os.chdir(folder)
  sys.path[0] = os.getcwd()
  sys.modules["numpy"].random.seed()
  del sys.modules["tests.forked"], sys.modules["tests"]
  runpy._run_module_as_main(command[2])  # pyright: ignore[reportAttributeAccessIssue]
