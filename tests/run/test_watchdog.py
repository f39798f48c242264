from __future__ import annotations

import subprocess
import sys

from diffdis_jax.run import checkpoint, watchdog
from diffdis_jax.run.watchdog import FIRST_TIME, STORAGE, Watchdog
from tests.command_runs import ROOT


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


def make(patience: float = 60.0):
  clock, said = Clock(), []
  return Watchdog(patience, end=said.append, clock=clock), clock, said


def take(dog: Watchdog, clock: Clock, what: str, *seconds: float, storage: bool = False) -> None:
  for each in seconds:
    dog.at(what, storage=storage)
    clock.now += each
    dog.check()


def test_a_step_may_take_three_medians_and_the_patience():
  dog, clock, said = make()
  take(dog, clock, "a step", 2.0, 9.0, 4.0, 3 * 4.0 + 60.0)
  assert not said
  take(dog, clock, "a step", 1.0, 1.0, 1.0, 3 * 2.0 + 61.0)  # of 1 1 1 2 4 9 72 the median is 2
  (message,) = said
  assert message.startswith("a step has taken 67 s, where 66 s is the most it may")


def test_the_first_of_a_kind_may_compile_and_storage_may_waver():
  dog, clock, said = make()
  take(dog, clock, "an evaluation", FIRST_TIME - 1)
  take(dog, clock, "a save", 1.0, 3.0 + STORAGE - 1, storage=True)
  assert not said
  take(dog, clock, "a batch", FIRST_TIME + 1, storage=True)
  assert said


def test_a_save_may_take_as_long_as_orbax_waits_for_it():
  assert checkpoint.SAVE_TIMEOUT < STORAGE


def test_what_comes_further_is_alive():
  dog, clock, said = make(patience=5.0)
  take(dog, clock, "an evaluation", 1.0)
  dog.at("an evaluation")
  for _ in range(9):
    clock.now += 7.0
    dog.check()
    dog.alive()
  assert not said


def test_a_look_at_the_moment_when_something_else_begins_does_not_put_it_back():
  dog, clock, said = make(patience=5.0)
  take(dog, clock, "a step", 1.0)
  dog.at("a step")
  looks = iter([lambda: dog.at("an evaluation")])  # within `alive`, when it asks for the time

  class Meanwhile(Clock):
    def __call__(self) -> float:
      next(looks, lambda: None)()
      return clock.now

  dog._clock = Meanwhile()
  dog.alive()
  clock.now += 100.0
  dog.check()
  assert not said, "the first evaluation may take as long"


HANGS = """
import threading, time
from diffdis_jax.run import watchdog
def waits_for_a_dead_peer(event): event.wait()
watchdog.FIRST_TIME, watchdog.LOOK = 0.2, 0.05
with watchdog.Watchdog(0.1).watching() as dog:
  dog.at("a step")
  waits_for_a_dead_peer(threading.Event())
"""


def test_a_process_that_hangs_says_where_and_ends_with_a_code_that_is_started_again():
  done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == watchdog.CODE == 1
  assert "in waits_for_a_dead_peer" in done.stderr, "of every thread, where it stands"
  assert done.stderr.splitlines()[-1].startswith("error: a step has taken 0")


def test_a_process_that_was_stopped_does_not_hang():
  """By Ctrl-Z, after which all of its clock's time has passed at once."""
  dog, clock, said = make(patience=5.0)
  take(dog, clock, "a step", 1.0)
  dog.at("a step")

  class Done:
    def __init__(self):
      self.looks = [1.0, 500.0, 1.0, 1.0]

    def wait(self, seconds):
      clock.now += self.looks[0] if self.looks else 0.0
      return not self.looks or not self.looks.pop(0)

  dog._done = Done()
  dog._look()
  assert not said


class Board:
  """Of two processes, one's side; the service may be down."""

  def __init__(self, texts: dict[int, str], index: int):
    self.texts, self.index, self.is_down = texts, index, False

  def write(self, text: str) -> None:
    self.others()
    self.texts[self.index] = text

  def others(self) -> list[str]:
    if self.is_down:
      raise RuntimeError("UNAVAILABLE")
    return [text for index, text in self.texts.items() if text and index != self.index]


def make_pair():
  """Two processes after three steps of a second: the first has no batch yet, for which the second's step waits."""
  clock, said, texts = Clock(), ([], []), {}
  boards = [Board(texts, index) for index in range(2)]
  dogs = [Watchdog(60.0, board=board, end=end.append, clock=clock) for board, end in zip(boards, said, strict=True)]
  for dog in dogs:
    take(dog, clock, "reading a batch", 1.0, storage=True)
    take(dog, clock, "a step", 1.0, 1.0, 1.0)
  dogs[0].at("reading a batch", storage=True, alone=True)
  dogs[1].at("a step")
  return dogs, boards, clock, said


def pass_time(dogs, clock: Clock, seconds: int) -> None:
  for _ in range(seconds):
    clock.now += 1.0
    for dog in dogs:
      dog.check()


def test_a_step_that_waits_for_another_hosts_storage_does_not_hang():
  dogs, _, clock, said = make_pair()
  pass_time(dogs, clock, 1000)
  assert said == ([], [])
  dogs[0].at("a step")  # it has its batch, and now both hang
  pass_time(dogs, clock, 150)
  assert all(messages and messages[0].startswith("a step has taken") for messages in said)


def test_what_waits_for_the_other_processes_itself_excuses_none_of_them():
  """A report gathers figures of all: with one process that hangs in a step, the other waits there."""
  dogs, _, clock, said = make_pair()
  dogs[0].at("a report", storage=True)
  pass_time(dogs, clock, 70)
  assert said[1] and not said[0]


def test_a_host_that_waits_for_storage_too_long_ends():
  dogs, _, clock, said = make_pair()
  pass_time(dogs, clock, int(STORAGE) + 10)
  assert said[0][0].startswith("reading a batch has taken") and not said[1]


def test_without_an_answer_of_the_others_a_step_hangs_as_before():
  dogs, boards, clock, said = make_pair()
  boards[1].is_down = True
  pass_time(dogs, clock, 70)
  assert said[1] and not said[0]
  boards[0].is_down, boards[1].is_down = True, False
  dogs[0].at("a step")
  pass_time(dogs, clock, 1)
  boards[0].is_down = False
  pass_time(dogs, clock, 1)
  assert not any(boards[0].texts.values()), "written later, when it could be"


def test_what_an_earlier_run_in_the_process_has_left_hides_no_hang():
  _, boards, clock, said = make_pair()
  boards[0].write("a save")
  dogs = [Watchdog(60.0, board=board, end=end.append, clock=clock) for board, end in zip(boards, said, strict=True)]
  for dog in dogs:
    take(dog, clock, "a step", 1.0, 1.0)
    dog.at("a step")
  pass_time(dogs, clock, 70)
  assert all(said)


def test_what_is_written_though_the_service_fails_is_taken_back():
  dogs, boards, clock, said = make_pair()
  write = boards[0].write

  def write_and_fail(text):
    write(text)
    if text:
      raise RuntimeError("DEADLINE_EXCEEDED")

  boards[0].write = write_and_fail
  pass_time(dogs, clock, 100)
  assert said == ([], [])
  dogs[0].at("a step")
  pass_time(dogs, clock, 150)
  assert all(said)
