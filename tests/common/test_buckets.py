"""Test paths in a bucket, with a server on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import uuid

import pytest

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import Preempted, UserError, may_pass
from diffdis_jax.evals import results
from diffdis_jax.run import digests, lock, provenance, workdir, writers

pytest_plugins = ("tests.bucket_server",)
# A thread of gcsfs holds its sessions until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def url(bucket):
  return f"{bucket}/{uuid.uuid4().hex}"


def elsewhere(code: str) -> None:
  """Run this code in another process, where `buckets` is imported."""
  done = subprocess.run(
    [sys.executable, "-c", f"from diffdis_jax.common import buckets\n{code}"], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_what_another_process_writes_is_seen_at_once(url):
  folder = buckets.path(url)
  files.write_whole(folder / "a", b"short")
  assert (folder / "a").read_bytes() == b"short" and [path.name for path in folder.iterdir()] == ["a"]
  elsewhere(f"(buckets.path({url!r}) / 'a').write_text('a longer text'); (buckets.path({url!r}) / 'b').write_text('')")
  assert (folder / "a").read_bytes() == b"a longer text"
  assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_a_folder_appears_with_all_its_files_or_not(url, tmp_path):
  with files.whole_folder(url) as folder:
    (folder / "a").write_text("1")
    (folder / "in").mkdir()
    (folder / "in" / "b").write_text("2")
  assert {name: facts["size"] for name, facts in buckets.files_below(url).items()} == {"a": 1, "in/b": 1}
  with pytest.raises(UserError, match="is not empty"), files.whole_folder(url):
    pass
  with pytest.raises(ValueError), files.whole_folder(f"{url}-other") as folder:
    (folder / "a").write_text("1")
    raise ValueError
  assert not buckets.files_below(f"{url}-other")


def steps_in(url):
  return [json.loads(line)["step"] for line in (buckets.path(url) / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_history_keep_every_line_over_a_resume(url):
  for step in (0, 5):
    with pytest.raises(Preempted), provenance.recorded(url, step=step, is_writer=True, facts={}):
      raise Preempted
  events = [(line["event"], line.get("step")) for line in provenance.read(url)]
  assert events == [("start", 0), ("end", None), ("start", 5), ("end", None)]
  # The process is killed after it saved the checkpoint of step 3.
  elsewhere(
    f"""
import os
from diffdis_jax.run import writers
writer = writers.open_writer({url!r}, start_step=0, is_writer=True)
for step in range(1, 5):
  writer.scalars(step, {{"loss": 1.0}})
writer.flush()
os._exit(0)
"""
  )
  assert steps_in(url) == [1, 2, 3, 4]
  writer = writers.open_writer(url, start_step=3, is_writer=True)
  writer.scalars(4, {"loss": 2.0})
  writer.scalars(5, {"loss": 2.0})
  writer.close()
  assert steps_in(url) == [1, 2, 3, 4, 5]
  events = [name for name in buckets.files_below(url) if name.startswith("events.out.tfevents.")]
  assert len(events) == 2


def test_a_second_run_is_refused_and_a_dead_ones_lock_taken_over(url, monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.2)
  monkeypatch.setattr(lock, "PATIENCE", 2.0)
  monkeypatch.setattr(lock, "ENDING", 0.3)
  with lock.Lock(url):
    assert json.loads((buckets.path(url) / "lock.json").read_text())["pid"] == os.getpid()
    with pytest.raises(lock.InUse, match="is in use by process"):
      lock.Lock(url).__enter__()
  assert not (buckets.path(url) / "lock.json").exists()
  elsewhere(f"import os\nfrom diffdis_jax.run import lock\nlock.Lock({url!r}).__enter__()\nos._exit(0)")
  with lock.Lock(url):
    assert json.loads((buckets.path(url) / "lock.json").read_text())["pid"] == os.getpid()


def test_a_bucket_that_is_away_is_not_taken_for_an_empty_one(url, monkeypatch):
  """Otherwise a run would start from nothing, or delete its checkpoints as incomplete."""
  import aiohttp
  from gcsfs import GCSFileSystem

  mark = workdir.checkpoints(url) / "8" / digests.COMMIT_MARK
  mark.write_text("")
  assert workdir.committed_steps(workdir.checkpoints(url)) == [8]
  assert mark.exists() and mark.parent.is_dir() and not mark.is_dir()
  assert not (mark.parent / "ema").exists() and not (mark.parent / "ema").is_dir()

  async def refuse(*args, **kwargs):
    raise aiohttp.ClientConnectionError("away")

  monkeypatch.setattr(GCSFileSystem, "_call", refuse)
  for ask in (
    lambda: workdir.committed_steps(workdir.checkpoints(url)),
    mark.exists,
    mark.parent.is_dir,
    lambda: workdir.check_config(url, {}),
  ):
    with pytest.raises(Exception) as raised:
      ask()
    assert may_pass(raised.value)


def test_a_mark_is_copied_after_what_it_marks(bucket, monkeypatch):
  """A copy that is killed halfway must not pass for a complete folder."""
  from gcsfs import core

  copied = []

  async def put(self, source, *args, **kwargs):
    await asyncio.sleep(0 if source.endswith("mark") else 0.02)
    copied.append(pathlib.Path(source).name)

  monkeypatch.setattr(core.GCSFileSystem, "_put_file", put)
  with files.whole_folder(f"{bucket}/{uuid.uuid4().hex}", last={"a_mark"}) as folder:
    (folder / "0").mkdir()
    for name in ("0/a_mark", "0/arrays", "b"):
      (folder / name).write_text(name)
  assert sorted(copied[:2]) == ["arrays", "b"] and copied[2:] == ["a_mark"]


def test_a_bucket_that_does_not_exist_is_refused_before_anything_is_made(url):
  results.check_out(f"{url}/new/F.json")
  assert not buckets.path(url).exists(), "the file that was tried is gone"
  with pytest.raises(UserError, match="cannot write --out=gs://missing/new/F.json: "):
    results.check_out("gs://missing/new/F.json")
  with pytest.raises(UserError, match="cannot write --out=gs://missing/out"), files.whole_folder("gs://missing/out"):
    pytest.fail("it was to be filled")
