"""Kill every command at random moments: its files are whole or absent, and the same command ends in the same files.

pytest -m full tests/test_kills.py --log-cli-level=INFO [-k prepare]

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
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from diffdis_jax.run import workdir
from tests import killed_commands
from tests.command_runs import ROOT
from tests.killing import Course, Killer
from tests.test_resume import metrics, restore_training, steps_logged

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)
KILLS = int(os.environ.get("DIFFDIS_KILLS", "6"))
STEPS, SAVE_EVERY = 60, 10


def command(run: pathlib.Path) -> list[str]:
  fields = {"num_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "eval_every": SAVE_EVERY}
  flags = [f"--config.{name}={value}" for name, value in {**fields, "train_evals": ("test",)}.items()]
  train = [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py", f"--workdir={run}", *flags]
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
  return workdir.latest_step(str(run)) or 0


def wait_for_a_moment(launcher: subprocess.Popen, run: pathlib.Path, chance: random.Random) -> str:
  """Returns at some moment of the start, of the steps, of a save, or of an evaluation."""
  kind = chance.choice(("start", "steps", "steps", "save", "evaluation"))
  if kind == "start":
    time.sleep(chance.uniform(0, 20))
    return kind
  unfinished = lambda: {path.name for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")}
  logged, left = steps_logged(run), unfinished()
  measured = lambda: [step for step in steps_logged(run) if step % SAVE_EVERY == 0]
  before = measured()
  happened = {
    "steps": lambda: steps_logged(run) != logged,
    "save": lambda: unfinished() - left,
    "evaluation": lambda: len(measured()) > len(before),
  }[kind]
  while launcher.poll() is None and not happened():
    time.sleep(0.002)
  time.sleep(chance.uniform(0, {"steps": 3.0, "save": 0.05, "evaluation": 0.5}[kind]))
  return kind


@pytest.mark.full
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
  """Return moments all over the command, and as many while it writes, one in each equal stretch."""
  even = [(i + chance.random()) / ((count + 1) // 2) for i in range((count + 1) // 2)]
  while_it_writes = [course.begun + u * (course.end - course.begun) for u in even]
  found = while_it_writes + [u * course.end for u in even]
  chance.shuffle(found)
  return found[:count]


@pytest.mark.full
@pytest.mark.parametrize("name", killed_commands.MAKERS)
def test_killed_anywhere_it_is_whole_or_absent_and_goes_on(name, request, tmp_path, environment):
  """With test_the_page, there are 50 SIGKILLs and 50 SIGTERMs."""
  chance = random.Random(f"{SEED} {name}")
  (tmp_path / "raw").mkdir()
  case = killed_commands.MAKERS[name](request, tmp_path / "raw")
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
    if ended.code == 0:  # the signal came too late
      assert differing(case.written(killer.out), course.written) == []
    else:
      assert ended.code in codes | late, ended
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


@pytest.mark.full
@pytest.mark.parametrize("name", ["train", "pairs", "import_weights"])
def test_of_two_at_once_one_is_refused(name, request, tmp_path, environment):
  (tmp_path / "raw").mkdir()
  killer = Killer(killed_commands.MAKERS[name](request, tmp_path / "raw"), tmp_path / "work", environment)
  course = killer.undisturbed()
  killer.clear()
  with killer.start() as one, killer.start() as two:
    said = [process.communicate(timeout=300)[1] for process in (one, two)]
  codes = [one.returncode, two.returncode]
  assert sorted(codes) == [0, 2], said
  assert said[codes.index(2)].splitlines()[-1].startswith("error: ") and "Traceback" not in said[codes.index(2)]
  assert_goes_on(killer, course)


@pytest.mark.full
def test_the_page_killed_as_it_starts_and_ends(tmp_path, environment, joint_run):
  """Six times. What is uploaded to the page that follows, and was to the killed ones, is gone at its end."""
  chance, uploads, log = random.Random(SEED), tmp_path / "uploads", tmp_path / "log"
  command = [sys.executable, "-m", "diffdis_jax.app", f"--workdir={joint_run}", "--port=0", "--num_images=16"]
  environment = {**environment, "GRADIO_TEMP_DIR": str(uploads)}

  def start() -> subprocess.Popen:
    with log.open("w") as file:
      return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

  def serves(process: subprocess.Popen) -> subprocess.Popen:
    while "the page is at" not in log.read_text():
      assert process.poll() is None, log.read_text()
      time.sleep(0.05)
    return process

  def whole() -> tuple[float, float]:
    """Seconds of its start, and of its end."""
    begin, process = time.monotonic(), serves(start())
    (folder,) = uploads.iterdir()
    (folder / "upload.png").touch()
    asked = time.monotonic()
    process.terminate()
    assert process.wait(60) == 0 and not any(uploads.iterdir()), log.read_text()
    return asked - begin, time.monotonic() - asked

  starting, ending = whole()
  for place, number in enumerate([signal.SIGKILL, signal.SIGTERM] * 3):
    process, share = start(), chance.random()
    if place < 3:
      time.sleep(share * starting)
    else:
      serves(process).terminate()
      time.sleep(share * ending)
    process.send_signal(number)
    code, said = process.wait(30), log.read_text()
    left = sorted(path.name for path in uploads.iterdir())
    logging.info(
      "page: %s at %.2f of its %s: code %d, left %s", number.name, share, "start" if place < 3 else "end", code, left
    )
    assert "Traceback" not in said, said
    assert code in ({-signal.SIGKILL, 0} if number == signal.SIGKILL else {-signal.SIGTERM, 143, 0})
  whole()
