"""Every command, killed at random moments: what it writes is whole or absent, and the same command ends in the same.

pytest -m slow tests/test_kills.py --log-cli-level=INFO [-k prepare]

A run of two processes, started again by launch/local.sh, is killed DIFFDIS_KILLS times; DIFFDIS_KILLS_SEED gives other
moments.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from diffdis_jax.run import committed
from tests import forked, killing
from tests.command_runs import ROOT
from tests.test_resume import metrics, restore_training, steps_logged

pytest_plugins = ("tests.command_runs",)
KILLS = int(os.environ.get("DIFFDIS_KILLS", "6"))
STEPS, SAVE_EVERY = 60, 10


def command(run: pathlib.Path) -> list[str]:
  fields = {"num_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  train = [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py:autoencoder", f"--workdir={run}", *flags]
  return ["launch/local.sh", "-n", "2", "-d", "1", "--max-restarts", "1000", "--", *train]


def children(parent: int) -> list[int]:
  """The processes that train; not the launcher's own helpers."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
      if int(fields[1]) == parent and b"diffdis_jax.train" in (stat.parent / "cmdline").read_bytes():
        found.append(int(stat.parent.name))
    except OSError:
      pass
  return found


def newest(run: pathlib.Path) -> int:
  return committed.latest_step(str(run)) or 0


def wait_for_a_moment(launcher: subprocess.Popen, run: pathlib.Path, chance: random.Random) -> str:
  """Returns at some moment of the start, of the steps, or of a save."""
  kind = chance.choice(("start", "steps", "steps", "save"))
  if kind == "start":
    time.sleep(chance.uniform(0, 20))
    return kind
  unfinished = lambda: {path.name for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")}
  logged, left = steps_logged(run), unfinished()
  happened = {"steps": lambda: steps_logged(run) != logged, "save": lambda: unfinished() - left}[kind]
  while launcher.poll() is None and not happened():
    time.sleep(0.002)
  time.sleep(chance.uniform(0, 3.0 if kind == "steps" else 0.05))
  return kind


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path, environment):
  chance = random.Random(0)
  whole = tmp_path / "whole"
  subprocess.run(command(whole), cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)

  kills, lost = 0, []
  for number in range(KILLS):
    run = tmp_path / f"run{number}"
    with (tmp_path / f"run{number}.log").open("w") as log:
      launcher = subprocess.Popen(command(run), cwd=ROOT, env=environment, stdout=log, stderr=log)
    while launcher.poll() is None:
      if kills == KILLS:
        launcher.wait()
        break
      kind = wait_for_a_moment(launcher, run, chance)
      victims = children(launcher.pid)
      if len(victims) < 2 or launcher.poll() is not None:
        continue
      if chance.random() < 0.5:
        victims = [chance.choice(victims)]
      for victim in victims:
        os.kill(victim, signal.SIGKILL)
      reached = max(steps_logged(run), default=0)
      kills += 1
      while launcher.poll() is None and set(children(launcher.pid)) & set(victims):
        time.sleep(0.01)
      while launcher.poll() is None and len(children(launcher.pid)) != 2:
        time.sleep(0.01)
      lost.append(reached - newest(run))
      logging.info("kill %d: %s, %d of 2, at step %d, kept %d", kills, kind, len(victims), reached, newest(run))
    assert launcher.returncode == 0, (tmp_path / f"run{number}.log").read_text()[-3000:]
    assert_same_end(run, whole)
    starts = len(re.findall("host 0 of 2", (tmp_path / f"run{number}.log").read_text()))
    logging.info("run %d ended in the same bits, after %d starts", number, starts)
    if kills == KILLS:
      break
  assert kills == KILLS
  logging.info("lost steps: %s", json.dumps(sorted(lost)))
  # A save runs in the background: until it is committed, the steps after it are lost with those before it.
  assert max(lost) < 2 * SAVE_EVERY


def assert_same_end(run: pathlib.Path, whole: pathlib.Path) -> None:
  """Metrics, the state restored by one process, and the batch that would be next."""
  assert metrics(run) == metrics(whole)
  (expected, next_batch), (found, next_found) = restore_training(whole), restore_training(run)
  np.testing.assert_array_equal(next_found, next_batch)
  for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


# --- every command, killed at any moment ---

SEED = int(os.environ.get("DIFFDIS_KILLS_SEED", "0"))
DEADLINES = (0.3, 2.0, 30.0)  # seconds that whoever sends SIGTERM gives a command


class Ended(NamedTuple):
  code: int
  said: str
  seconds: float


class Course(NamedTuple):
  """Of an undisturbed command: when it begins to write, and ends, in seconds; and what it has written."""

  begun: float
  end: float
  written: dict[str, Any]


class Killer:
  """Runs a case's command in a folder of its own, again and again."""

  def __init__(self, case: killing.Case, folder: pathlib.Path, environment: dict[str, str]):
    self.case, self.folder = case, folder
    self.out = folder / case.name
    self.environment = {"GLIBC_TUNABLES": "", **environment}

  def start(self) -> subprocess.Popen[str]:
    command = [word.replace(killing.OUT, str(self.out)) for word in self.case.command]
    if "diffdis_jax.ablate" in command:  # in a group of its own, of which a scheduler kills all
      pipe = subprocess.PIPE
      options: Any = dict(cwd=ROOT, env=self.environment, text=True, start_new_session=True)
      return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, **options)
    return forked.start(command, self.environment)

  def clear(self) -> None:
    shutil.rmtree(self.folder, ignore_errors=True)
    self.folder.mkdir()

  def undisturbed(self) -> Course:
    self.clear()
    self.finish()  # which compiles
    self.clear()
    begin, begun = time.monotonic(), None
    with self.start() as process:
      reading = threading.Thread(target=process.communicate)
      reading.start()
      while reading.is_alive():
        if begun is None and any(self.folder.iterdir()):
          begun = time.monotonic() - begin
        time.sleep(0.01)
    assert process.returncode == 0 and begun is not None
    return Course(begun, time.monotonic() - begin, self.case.written(self.out))

  def finish(self) -> Ended:
    with self.start() as process:
      _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return Ended(process.returncode, said, 0)

  def kill(self, at: float, number: int, *, deadline: float, group: bool) -> Ended | None:
    """What became of it when it got this signal then, and SIGKILL after the deadline; None where it had ended."""
    with self.start() as process:
      try:
        process.communicate(timeout=at)
        return None
      except subprocess.TimeoutExpired:
        pass
      begin = time.monotonic()
      os.killpg(process.pid, number) if group else process.send_signal(number)
      try:
        _, said = process.communicate(timeout=deadline)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
        _, said = process.communicate()
      return Ended(process.returncode, said, time.monotonic() - begin)

  def litter(self) -> list[str]:
    """What is there beside what the command writes, or hidden in it."""
    return sorted(
      str(path.relative_to(self.folder))
      for path in self.folder.rglob("*")
      if path.name.startswith(".") or "tmp" in path.suffix or self.folder == path.parent != self.out.parent
    )


def assert_whole_or_absent(killer: Killer, course: Course) -> str:
  found, expected = killer.case.there(killer.out), course.written
  lacking = expected.keys() - found.keys()
  assert not found or all(map(killer.case.later, lacking)), sorted(lacking)[:5]
  assert differing(found, {name: expected.get(name) for name in found}) == []
  visible = {path.name for path in killer.folder.iterdir() if not path.name.startswith(".")}
  assert visible <= {killer.out.name}
  return "whole" if not lacking else "a part" if found else "absent"


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
  return [name for name in {**found, **expected} if name not in found or found[name] != expected.get(name)]


def moments(course: Course, count: int, chance: random.Random) -> list[float]:
  """All over the command, and as many while it writes: one in each equal stretch of either."""
  even = [(i + chance.random()) / ((count + 1) // 2) for i in range((count + 1) // 2)]
  while_it_writes = [course.begun + u * (course.end - course.begun) for u in even]
  found = while_it_writes + [u * course.end for u in even]
  chance.shuffle(found)
  return found[:count]


@pytest.mark.slow
@pytest.mark.parametrize("name", killing.MAKERS)
def test_killed_anywhere_it_is_whole_or_absent_and_goes_on(name, request, tmp_path, environment):
  """50 SIGKILLs and 50 SIGTERMs in all, with test_the_page."""
  chance = random.Random(f"{SEED} {name}")
  (tmp_path / "raw").mkdir()
  case = killing.MAKERS[name](request, tmp_path / "raw")
  killer = Killer(case, tmp_path / "work", environment)
  course = killer.undisturbed()
  numbers = [signal.SIGKILL, signal.SIGTERM] * (case.kills // 2)
  chance.shuffle(numbers)
  killer.clear()
  for at, number in zip(moments(course, case.kills, chance), numbers, strict=True):
    deadline, group = chance.choice(DEADLINES), name == "ablate" and chance.random() < 0.5
    while (ended := killer.kill(at, number, deadline=deadline, group=group)) is None:
      assert differing(case.written(killer.out), course.written) == []
      killer.clear()
      at *= 0.8
    state = assert_whole_or_absent(killer, course)
    logging.info(
      "%s: %s at %.2f of %.2f s (writes from %.2f), deadline %g: code %d after %.2f s, %s, left %s",
      *(
        name,
        number.name,
        at,
        course.end,
        course.begun,
        deadline,
        ended.code,
        ended.seconds,
        state,
        killer.litter()[:3],
      ),
    )
    assert "Traceback" not in ended.said and "Exception ignored" not in ended.said, ended.said
    codes = {-signal.SIGKILL} if number == signal.SIGKILL else {-signal.SIGTERM, 143, case.code}
    late = {-signal.SIGKILL} if deadline < max(DEADLINES) else set()
    assert ended.code in codes | late or (ended.code == 0 and state == "whole"), ended
    if chance.random() < 0.5:
      assert_goes_on(killer, course)
  assert_goes_on(killer, course)


def assert_goes_on(killer: Killer, course: Course) -> None:
  """The same command ends as if it had never been killed; to one that is done there is nothing to do."""
  if killer.litter() or differing(killer.case.there(killer.out), course.written):
    killer.finish()
  assert differing(killer.case.written(killer.out), course.written) == []
  assert killer.litter() == []
  killer.clear()
