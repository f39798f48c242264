"""Reads that are tried again."""

from __future__ import annotations

import errno
import runpy
import subprocess
import sys
import time

import pytest

from diffdis_jax import errors
from diffdis_jax.common import storage
from diffdis_jax.errors import Gone, may_pass


class Flaky:
  def __init__(self, *errors):
    self.errors, self.calls = [*errors], 0

  def __call__(self):
    self.calls += 1
    if self.errors:
      raise self.errors.pop(0)
    return 7


@pytest.fixture
def pauses(monkeypatch):
  made = []
  monkeypatch.setattr(storage, "_rest", made.append)
  monkeypatch.setattr(storage, "_told", {})
  return made


def test_what_may_pass_is_tried_again_with_growing_pauses(pauses, caplog):
  errors = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale"), ConnectionResetError(), Gone("x")]
  read = Flaky(*errors)
  assert storage.patiently(read, "the data") == 7
  assert read.calls == 5 and pauses == [1, 2, 4, 8]
  said = [record.getMessage() for record in caplog.records]
  assert said[0] == "cannot read the data: Input/output error; trying again in 1 s"
  assert said[-1] == "the data can be read again, after 15 s"


def test_what_gcsfs_raises_for_any_answer_of_a_failing_server_may_pass():
  from gcsfs import retry

  for status in (408, 429, *range(500, 505)):
    with pytest.raises(Exception) as raised:
      retry.validate_response(status, b"", "gs://b/c")
    assert may_pass(raised.value), status


def test_a_403_in_the_middle_is_tried_again(pauses):
  from gcsfs import retry

  with pytest.raises(OSError) as raised:
    retry.validate_response(403, b"", "gs://b/c")
  read = Flaky(raised.value, raised.value)
  assert storage.patiently(read, "gs://b/c") == 7 and pauses == [1, 2]


def test_a_system_without_linuxs_own_number_has_the_others(monkeypatch):
  """As macOS. Every command reads the numbers when it starts."""
  monkeypatch.delattr(errno, "EREMOTEIO", raising=False)
  there = runpy.run_path(errors.__file__)
  assert there["may_pass"](OSError(errno.ESTALE, "")) and not there["may_pass"](OSError(errno.ENOENT, ""))


def test_what_stays_away_ends_in_one_line(pauses):
  with pytest.raises(storage.Away, match="^gs://b/c could not be read for 300 s: two lines$") as raised:
    storage.patiently(Flaky(*[Gone("two\nlines")] * 99), "gs://b/c")
  assert sum(pauses) == storage.PATIENCE and max(pauses) == storage.LONGEST
  assert raised.value.errno is None  # by which common/cli.py ends with one line and code 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), ValueError("bug"), OSError(errno.ENOSPC, "full")])
def test_other_errors_are_raised_at_once(pauses, error):
  with pytest.raises(type(error)):
    storage.patiently(Flaky(error), "the data")
  assert not pauses


def test_a_thing_that_many_threads_wait_for_is_named_once(pauses, caplog):
  for _ in range(3):
    storage.patiently(Flaky(Gone("x")), "the data")
  assert [record.getMessage() for record in caplog.records].count("cannot read the data: x; trying again in 1 s") == 1


@pytest.mark.parametrize(
  "start",
  [
    "Thread(target=storage.patiently, args=(read, 'x')).start()",
    "ThreadPoolExecutor(1).submit(storage.patiently, read, 'x')",
  ],
)
def test_a_thread_that_waits_holds_no_program_up(start):
  """Nor one of a pool, such as Grain's."""
  code = (
    "from concurrent.futures import ThreadPoolExecutor\nfrom threading import Thread\n"
    "from diffdis_jax.common import storage\nfrom diffdis_jax.errors import Gone\n"
    f"def read(): raise Gone('x')\n{start}"
  )
  begin = time.monotonic()
  subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL, timeout=60)
  assert time.monotonic() - begin < 30
