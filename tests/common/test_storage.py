"""Test that reads are retried after an error that may pass."""

from __future__ import annotations

import errno

import pytest

from diffdis_jax.common import storage
from diffdis_jax.errors import Gone


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
  seconds = []
  monkeypatch.setattr(storage.time, "sleep", seconds.append)
  return seconds


def test_what_may_pass_is_tried_again_with_growing_pauses(pauses, caplog):
  errors = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale"), ConnectionResetError(), Gone("x")]
  read = Flaky(*errors)
  assert storage.patiently(read, "the data") == 7
  assert read.calls == 5 and pauses == [1, 2, 4, 8]
  assert caplog.messages[0] == "cannot read the data: Input/output error; trying again in 1 s"


def test_storage_that_stays_away_ends_in_one_line(pauses):
  with pytest.raises(storage.Away, match="^gs://b/c could not be read for 30. s: two") as raised:
    storage.patiently(Flaky(*[Gone("two\nlines")] * 99), "gs://b/c")
  assert storage.PATIENCE <= sum(pauses) < 310 and max(pauses) == storage.LONGEST
  assert raised.value.errno is None  # without it common/cli.py ends with one line and code 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), ValueError("bug"), OSError(errno.ENOSPC, "full")])
def test_other_errors_are_raised_at_once(pauses, error):
  with pytest.raises(type(error)):
    storage.patiently(Flaky(error), "the data")
  assert not pauses
