"""A forked command is what a process of its own would be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import forked
from tests.interrupting import is_alive

PROBE = """
import atexit, gc, importlib, json, locale, os, resource, signal, sys, threading, warnings
import wsgiref.handlers  # which copies all variables, for a server of prometheus_client's

read = set()
for name in ("__getitem__", "__contains__"):
  plain = getattr(os._Environ, name)
  setattr(os._Environ, name, lambda self, key, plain=plain: (read.add(key), plain(self, key))[1])
for library in ("numpy.random", *{libraries}):
  importlib.import_module(library)
asked = sorted(read)
main = sys.modules["__main__"]
handlers = {number.name: str(signal.getsignal(number)).partition(" at ")[0] for number in signal.valid_signals()
            if isinstance(number, signal.Signals)}
streams = [(s.fileno(), s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty())
           for s in (sys.stdin, sys.stdout, sys.stderr)]
seen = dict(
  argv=[sys.argv, sys.orig_argv], path=sys.path, flags=[repr(sys.flags), sys.warnoptions, sys._xoptions],
  executable=[sys.executable, sys.prefix, sys.getfilesystemencoding(), locale.getlocale()],
  main=[main.__name__, main.__spec__.name, main.__file__, main.__package__, sorted(vars(main))],
  cwd=os.getcwd(), environment={**os.environ}, umask=os.umask(0o77), parent=os.getppid(),
  group=[os.getpgid(0), os.getsid(0)], handlers=handlers, blocked=[*signal.pthread_sigmask(signal.SIG_BLOCK, ())],
  limits={name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")},
  affinity=sorted(os.sched_getaffinity(0)), streams=streams, open_files=sorted(os.listdir("/proc/self/fd")),
  thread=[threading.current_thread() is threading.main_thread(), threading.active_count()],
  collector=[gc.isenabled(), gc.get_threshold()], warnings=repr([each[:1] + each[2:] for each in warnings.filters]),
  read=sys.stdin.read(),
)
modules = sorted(sys.modules)
import numpy, random
drawn = [random.random(), numpy.random.rand()]
print(json.dumps([seen, modules, drawn, asked]))
sys.stderr.write("an error")
atexit.register(print, "the end")
sys.exit(3)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
  """In which there are modules that are run like commands."""
  folder = tmp_path_factory.mktemp("modules")
  (folder / "probe.py").write_text(PROBE.replace("{libraries}", repr(forked.LIBRARIES)))
  (folder / "act.py").write_text("import os, sys, time\nexec(sys.argv[1])\n")
  return {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "", "PYTHONPATH": str(folder)}


MODULES = ("probe", "act")


def act(what: str) -> list[str]:
  return [sys.executable, "-m", "act", what]


def test_it_sees_what_a_process_of_its_own_sees(environment):
  command = [sys.executable, "-m", "probe", "--a=b", "ä c"]
  one = forked.run(command, {**environment, "XDG_CACHE_HOME": "/elsewhere"}, modules=MODULES)  # so is the server
  environment = {**environment, "XDG_CACHE_HOME": "/cache", "PYTEST_CURRENT_TEST": "ü"}
  two = forked.run(command, environment, modules=MODULES)
  assert not forked.server_of(environment).refusal
  real = subprocess.run(
    command, cwd=forked.ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
  )
  (_, _, drawn, _), (seen, modules, others, _), (expected, real_modules, _, read) = (
    json.loads(done.stdout.splitlines()[0]) for done in (one, two, real)
  )
  assert seen == expected
  assert not {*drawn} & {*others}
  assert "JAX_PLATFORMS" in read and not {*read} & {*forked.READ_LATER}
  assert "jax" in modules and {*real_modules} <= {*modules}
  assert {name.split(".")[0] for name in {*modules} - {*real_modules}} <= sys.stdlib_module_names
  ends = [(done.returncode, done.stdout.splitlines()[1:], done.stderr) for done in (two, real)]
  assert ends[0] == ends[1] == (3, ["the end"], "an error")


@pytest.mark.parametrize(
  "what", ["1 / 0", "os.kill(os.getpid(), 9)", "os.abort()", "raise KeyboardInterrupt", "os._exit(7)", "sys.exit('no')"]
)
def test_it_ends_as_a_process_of_its_own(environment, what):
  done = forked.run(act(what), environment, modules=MODULES)
  real = subprocess.run(act(what), cwd=forked.ROOT, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (real.returncode, real.stdout)
  assert done.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_it_is_a_child_that_hears_signals_and_is_killed_when_its_time_is_over(environment, tmp_path, monkeypatch):
  with forked.start(act("time.sleep(60)"), environment, modules=MODULES, folder=tmp_path) as process:
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
  started, start = [], forked.start
  monkeypatch.setattr(forked, "start", lambda *args, **how: started.append(start(*args, **how)) or started[-1])
  with pytest.raises(subprocess.TimeoutExpired):
    forked.run(act("time.sleep(60)"), environment, modules=MODULES, folder=tmp_path, timeout=0.5)
  assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_no_server_outlives_the_tests(environment):
  code = (
    "import os, sys, time; from tests import forked; forked.LIBRARIES = ('numpy.random',)\n"
    "assert forked.run([sys.executable, '-m', 'act', ''], os.environ, modules=['act']).returncode == 0\n"
    "print(forked.server_of(os.environ).process.pid, flush=True)\n"
    "time.sleep(60)"
  )
  path = f"{forked.ROOT}:{environment['PYTHONPATH']}"
  tests = subprocess.Popen(
    [sys.executable, "-c", code], env={**environment, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
  )
  server = tests.stdout.readline().strip()
  assert is_alive(server)
  tests.kill()
  tests.communicate()
  deadline = time.monotonic() + 30
  while is_alive(server):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_what_is_no_command_with_a_network_is_a_process_of_its_own(environment, monkeypatch):
  started = []
  monkeypatch.setattr(forked, "Forked", lambda command, **options: started.append(command))
  monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, command, **options: None)
  monkeypatch.setattr(subprocess.Popen, "__del__", lambda self: None)
  train = [sys.executable, "-m", "diffdis_jax.train"]
  forked.start(train, environment)
  assert started == [train]
  for words in (["-m", "diffdis_jax.report"], ["-c", "diffdis_jax.train"], ["-Werror", *train[1:]]):
    forked.start([sys.executable, *words], environment)
  forked.start(["python", *train[1:]], environment)
  assert started == [train]
