"""Paths in a bucket, against a server of one on this machine."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
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
# Of sessions that gcsfs's own thread holds to the end.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def url(bucket):
  return f"{bucket}/{uuid.uuid4().hex}"


def elsewhere(code: str) -> None:
  """Runs it in another process, with `buckets` at hand."""
  done = subprocess.run(
    [sys.executable, "-c", f"from diffdis_jax.common import buckets\n{code}"], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_an_address_stays_one():
  assert os.fspath(buckets.absolute("gs://b/run")) == "gs://b/run"
  assert os.fspath(workdir.checkpoints("gs://b/run")) == "gs://b/run/checkpoints"
  assert os.fspath(buckets.absolute("run")) == str(pathlib.Path("run").absolute())


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://", "gs:///run", "http://host/run"])
def test_an_address_of_another_kind_is_refused(address):
  with pytest.raises(UserError, match=rf"{address} is no address that can be read; give a local path or gs://BUCKET"):
    buckets.path(address)
  with pytest.raises(UserError, match="file:///run is no address that can be read; give /run"):
    buckets.path("file:///run")


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="gs://b/run needs the package gcsfs: pip install gcsfs"):
    buckets.path("gs://b/run")


def test_a_local_path_is_asked_for(tmp_path):
  assert buckets.local(tmp_path, "--source") == tmp_path
  with pytest.raises(UserError, match="--source=gs://b/x must be a local path; copy it to this machine first"):
    buckets.local("gs://b/x", "--source")
  with pytest.raises(UserError, match="--out=gs://b/F.safetensors must be a local path; write it to this machine, and"):
    buckets.local("gs://b/F.safetensors", "--out")


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


def test_what_is_not_there_is_said(url):
  with pytest.raises(UserError, match=f"cannot read {url}/F.json: "):
    files.read_json(f"{url}/F.json")


def test_files_are_appended_to(url):
  for text in ("one\n", "two\n"):
    with buckets.appended(buckets.path(url) / "log") as file:
      file.write(text.encode())
  assert (buckets.path(url) / "log").read_text() == "one\ntwo\n"


def test_history_keeps_every_line(url):
  for step in (0, 5):
    with pytest.raises(Preempted), provenance.recorded(url, step=step, is_writer=True, facts={}):
      raise Preempted
  assert [(line["event"], line.get("step")) for line in provenance.read(url)] == [
    ("start", 0),
    ("end", None),
    ("start", 5),
    ("end", None),
  ]


def steps_in(url):
  return [json.loads(line)["step"] for line in (buckets.path(url) / "metrics.jsonl").read_text().splitlines()]


def test_metrics_keep_every_line_over_a_resume(url):
  # A process that is killed after a checkpoint of step 3.
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


def test_a_mirror_copies_now_and_then_and_not_at_each_line(url, monkeypatch):
  now, puts = [0.0], []
  monkeypatch.setattr(buckets.time, "monotonic", lambda: now[0])
  mirror = buckets.Mirror(buckets.path(url))
  system = buckets._system()

  class Counting:
    def put_file(self, file, to):
      puts.append(to)
      system.put_file(file, to)

  monkeypatch.setattr(buckets, "_system", Counting)
  for second in range(61):
    now[0] = float(second)
    with (mirror.folder / "lines").open("a") as file:
      file.write(f"{second}\n")
    mirror.copy_if_due()
  assert puts == [f"{url}/lines"] * 2
  mirror.close()
  assert (buckets.path(url) / "lines").read_text().splitlines() == [str(second) for second in range(61)]


def test_a_bucket_that_is_away_ends_no_run_and_loses_no_line(url, monkeypatch, caplog):
  mirror = buckets.Mirror(buckets.path(url))
  (mirror.folder / "lines").write_text("1\n")
  system = buckets._system()

  class Away:
    def put_file(self, file, to):
      raise OSError(errno.ECONNREFUSED, "refused")

  with monkeypatch.context() as patched:
    patched.setattr(buckets, "_system", Away)
    mirror.copy()
  assert "which is tried again" in caplog.text and not system.exists(f"{url}/lines")
  mirror.close()
  assert (buckets.path(url) / "lines").read_text() == "1\n"


@pytest.mark.parametrize("failures, kept", [(3, True), (4, False)])
def test_the_last_lines_of_a_run_wait_for_a_bucket_that_is_away(url, monkeypatch, caplog, failures, kept):
  mirror = buckets.Mirror(buckets.path(url))
  (mirror.folder / "lines").write_text("1\n")
  system, tries = buckets._system(), []

  class Away:
    def put_file(self, file, to):
      tries.append(file)
      if len(tries) <= failures:
        raise OSError(errno.ECONNREFUSED, "refused")
      system.put_file(file, to)

  monkeypatch.setattr(buckets, "_system", Away)
  monkeypatch.setattr(buckets, "LAST_PAUSES", (0.0, 0.0, 0.01, 0.02))
  mirror.close()
  assert system.exists(f"{url}/lines") == kept and not mirror.folder.exists()
  assert (f"the last lines of {url} could not be written" in caplog.text) == (not kept)


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
  """Else a run would begin from nothing, or remove its checkpoints as those of killed saves."""
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


def test_an_upload_holds_few_files_in_memory(bucket, monkeypatch, tmp_path):
  """Of each gcsfs holds 50 MB, and by itself it would take 128 at a time, or all where many files may be open."""
  from gcsfs import core

  now, most = 0, 0

  async def put(*args, **kwargs):
    nonlocal now, most
    now, most = now + 1, max(most, now + 1)
    await asyncio.sleep(0.02)
    now -= 1

  monkeypatch.setattr(core.GCSFileSystem, "_put_file", put)
  for i in range(30):
    (tmp_path / f"{i}.array_record").write_bytes(b"")
  buckets.upload(tmp_path, f"{bucket}/{uuid.uuid4().hex}")
  assert 1 < most <= 8


def test_a_mark_is_copied_after_what_it_marks(bucket, monkeypatch):
  """A copy that is killed in between must not pass for a whole folder."""
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


def test_results_in_a_bucket_that_there_is_not_are_refused_before_anything_is_measured(url):
  results.check_out(f"{url}/new/F.json")
  assert not buckets.path(url).exists(), "the file that was tried is gone"
  with pytest.raises(UserError, match="cannot write --out=gs://missing/new/F.json: "):
    results.check_out("gs://missing/new/F.json")


def test_a_folder_in_a_bucket_that_there_is_not_is_refused_before_it_is_filled(bucket):
  with pytest.raises(UserError, match="cannot write --out=gs://missing/out"), files.whole_folder("gs://missing/out"):
    pytest.fail("it was to be filled")
