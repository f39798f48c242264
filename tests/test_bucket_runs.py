"""Test that a run whose folder is in a bucket ends in the same bits as one on a disk."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import jax
import numpy as np
import pytest

from diffdis_jax.common import buckets, files
from diffdis_jax.data import shards, sources
from diffdis_jax.data.records import INFO
from diffdis_jax.errors import Gone, UserError
from diffdis_jax.run import checkpoint, digests, restore, workdir
from tests import command_runs, raw_pairs
from tests.command_runs import GENERATED, MEASURED, ROOT, SAVE_EVERY, STEPS, call, joint_flags
from tests.run.test_checkpoint import make_iterator, make_state
from tests.test_resume import kill_when, metrics, restore_training

pytest_plugins = ("tests.command_runs", "tests.bucket_server")
# gcsfs's thread keeps its sessions open until the end, which causes these warnings.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def url(bucket):
  return f"{bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def on_a_bucket(environment, bucket_environment):
  return environment | bucket_environment


def assert_same_end(run, whole):
  assert metrics(run) == metrics(whole)
  (expected, next_batch), (restored, next_of_run) = restore_training(whole), restore_training(run)
  np.testing.assert_array_equal(next_of_run, next_batch)
  for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(restored), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def succeed(verb, environment, *flags):
  done = call(verb, environment, *flags)
  assert done.returncode == 0, done.stderr
  return done


def test_a_run_in_a_bucket_is_killed_resumed_and_used(
  tmp_path, url, on_a_bucket, joint_run, autoencoder_run, joint_results, joint_images
):
  command = [sys.executable, "-m", "diffdis_jax.train", *joint_flags(autoencoder_run), f"--workdir={url}"]
  kill_when(command, on_a_bucket, lambda: (workdir.latest_step(url) or 0) >= SAVE_EVERY)
  assert SAVE_EVERY <= workdir.latest_step(url) < STEPS
  done = command_runs.run(command, on_a_bucket)
  assert done.returncode == 0, done.stderr
  assert_same_end(buckets.path(url), pathlib.Path(joint_run))
  assert not list(ROOT.glob("gs:*"))

  succeed("evaluate", on_a_bucket, f"--workdir={url}", *MEASURED, f"--out={url}/eval.json")
  measured, expected = (json.loads(path.read_text()) for path in (buckets.path(url) / "eval.json", joint_results))
  for task, datasets in expected.items():
    for name, record in datasets.items():
      assert measured[task][name]["metrics"] == record["metrics"]

  succeed("generate", on_a_bucket, f"--workdir={url}", *GENERATED, f"--out={url}/drawn")
  for name in ("00000.png", "00001.png"):
    assert (buckets.path(url) / "drawn" / name).read_bytes() == (joint_images / name).read_bytes()

  succeed("report", on_a_bucket, f"--workdir={url}", f"--out={tmp_path}/report.html")
  assert "zero_shot" in (tmp_path / "report.html").read_text()

  refused = call("train", on_a_bucket, *joint_flags(autoencoder_run), f"--workdir={url}", "--config.seed=3")
  assert refused.returncode == 2
  assert refused.stderr.splitlines()[-1].startswith(f"error: {url} holds a run of another config: seed is 0 there")


def run_as_two(command, environment):
  """Run a command as the two processes that launch/local.sh would start."""
  from tests import bucket_server  # here: pytest warns if a plugin is imported before it is registered

  where = {"DIFFDIS_COORDINATOR_ADDRESS": f"127.0.0.1:{bucket_server.free_port()}", "DIFFDIS_NUM_PROCESSES": "2"}
  environments = [environment | where | {"DIFFDIS_LAUNCHED": "1", "DIFFDIS_PROCESS_ID": str(i)} for i in range(2)]
  processes = [command_runs.start(command, variables, output=subprocess.DEVNULL) for variables in environments]
  try:
    assert [process.wait(300) for process in processes] == [0, 0]
  finally:
    for process in processes:
      process.kill()
      process.wait()


def test_two_processes_one_of_which_is_killed(tmp_path, url, on_a_bucket, environment):
  fields = {"num_steps": 12, "save_every": 4, "log_every": 1, "data.loader.num_threads": 0}
  train = [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py:autoencoder"]
  train += [f"--config.{name}={value}" for name, value in fields.items()]
  launch = ["launch/local.sh", "-n", "2", "-d", "1", "--max-restarts", "2", "--"]
  run_as_two([*train, f"--workdir={tmp_path / 'whole'}"], environment)

  with (tmp_path / "log").open("w") as log:  # the launcher has its own descriptor
    launcher = subprocess.Popen(
      [*launch, *train, f"--workdir={url}"], cwd=ROOT, env=on_a_bucket, stdout=log, stderr=log
    )
  deadline = time.monotonic() + 300
  while not workdir.latest_step(url):
    assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
    time.sleep(0.01)
  for stat in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      named = stat.read_bytes().split(b"\0")
    except OSError:
      continue
    if f"--workdir={url}".encode() in named and b"diffdis_jax.train" in named and b"launch/local.sh" not in named:
      os.kill(int(stat.parent.name), signal.SIGKILL)
      break
  assert launcher.wait(300) == 0, (tmp_path / "log").read_text()
  assert (tmp_path / "log").read_text().count("host 0 of 2") == 2
  assert_same_end(buckets.path(url), tmp_path / "whole")


@pytest.mark.parametrize("seconds", [4, pytest.param(20, marks=pytest.mark.full)])
def test_a_bucket_that_is_unreachable_for_a_while_changes_no_bit(
  tmp_path, environment, monkeypatch, joint_run, autoencoder_run, seconds
):
  """The bucket is unreachable while a run saves, and while the next one starts."""
  from tests import bucket_server  # here: pytest warns if a plugin is imported before it is registered

  (tmp_path / "bucket").mkdir()
  port = bucket_server.free_port()
  server = bucket_server.environment_of(f"http://127.0.0.1:{port}")
  command = [sys.executable, "-m", "diffdis_jax.train", *joint_flags(autoencoder_run), "--workdir=gs://bucket/run"]
  start = lambda: command_runs.start(command, environment | server)
  with bucket_server.serving(tmp_path, port):
    running = start()
    while not any(tmp_path.rglob("commit_success.txt")):
      assert running.poll() is None
      time.sleep(0.02)
  time.sleep(seconds)
  with bucket_server.serving(tmp_path, port):
    stderr = running.communicate(timeout=300)[1]
    assert running.returncode == 0, stderr
    for name, value in server.items():
      monkeypatch.setenv(name, value)
    buckets.path("gs://bucket")  # first: it decides how gcsfs is imported
    from gcsfs import GCSFileSystem

    GCSFileSystem.clear_instance_cache()
    assert_same_end(buckets.path("gs://bucket/run"), pathlib.Path(joint_run))
  running = start()  # the run is finished, and looks for its checkpoints
  time.sleep(4)
  with bucket_server.serving(tmp_path, port):
    stderr = running.communicate(timeout=300)[1]
    assert running.returncode == 0 and "finished at step" in stderr, stderr


def test_a_second_run_is_refused(url, on_a_bucket):
  code = f"from diffdis_jax.run import lock\nwith lock.Lock({url!r}):\n  print('locked', flush=True)\n  input()"
  holder = subprocess.Popen(
    [sys.executable, "-c", code], env=on_a_bucket, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  try:
    assert holder.stdout.readline() == "locked\n"
    done = call("train", on_a_bucket, "--config=tests/tiny.py:autoencoder", f"--workdir={url}")
    assert done.returncode == 75, done.stderr
    assert f"--workdir={url} is in use by process {holder.pid}" in done.stderr.splitlines()[-1]
  finally:
    holder.communicate("\n")
  assert not buckets.files_below(url)


def test_an_export_from_and_to_a_bucket(tmp_path, bucket, url, on_a_bucket, exportable_run):
  buckets.upload(pathlib.Path(exportable_run), url)
  succeed("export_weights", on_a_bucket, f"--workdir={exportable_run}", f"--out={tmp_path}/out")
  succeed("export_weights", on_a_bucket, f"--workdir={url}", f"--out={url}-out")
  files = {path.relative_to(tmp_path / "out"): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
  assert set(buckets.files_below(f"{url}-out")) == {str(name) for name in files}
  for name, path in files.items():
    if name.name != "README.md":  # README.md names the run, and so differs
      assert (buckets.path(f"{url}-out") / name).read_bytes() == path.read_bytes(), name


def test_data_are_prepared_to_a_bucket_and_read_back(tmp_path, url, on_a_bucket, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  on_a_bucket = on_a_bucket | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
  raw_pairs.write_pairs(tmp_path / "raw", 24)
  source = f"--source={tmp_path / 'raw'}"
  succeed("prepare_data", on_a_bucket, "pairs", source, f"--out={tmp_path / 'out'}", "--num_processes=1")
  succeed("prepare_data", on_a_bucket, "pairs", source, f"--out={url}", "--num_processes=1")
  assert set(buckets.files_below(url)) == {path.name for path in (tmp_path / "out").iterdir()}
  assert not list((tmp_path / "cache" / "diffdis_jax" / "prepared").iterdir()) and not list(ROOT.glob("gs:*"))

  again = call("prepare_data", on_a_bucket, "pairs", source, f"--out={url}")
  assert (again.returncode, again.stderr) == (2, f"error: --out={url} holds a data set; name a new folder\n")

  open_pairs = lambda path: sources.open_source(name="pairs", path=path, split="train", image_size=8)
  in_bucket, local = open_pairs(url), open_pairs(str(tmp_path / "out"))
  assert [in_bucket[i] for i in range(len(in_bucket))] == [local[i] for i in range(len(local))] and len(in_bucket) == 24

  data = [f"--config.data.{name}={value}" for name, value in {"name": "pairs", "path": url}.items()]
  few = ["--config=tests/tiny.py:autoencoder", "--config.num_steps=2", "--config.batch_size=8", *data]
  succeed("train", on_a_bucket, *few, f"--workdir={tmp_path / 'run'}")
  assert [line["step"] for line in metrics(tmp_path / "run")] == [2]


def test_a_copy_to_a_bucket_that_was_cut_short_is_completed(tmp_path, url, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  written = []

  def write(folder):
    written.append(folder)
    folder.mkdir(parents=True)
    for name in ("a", "dataset_info.json", "card.json"):
      (folder / name).write_text(name)

  def killed_upload(folder, to, *, last):
    (buckets.path(to) / "a").write_text("a")
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(buckets, "upload", killed_upload)
    with pytest.raises(KeyboardInterrupt):
      files.publish(write, url, mark=INFO)
  files.publish(write, url, mark=INFO)
  assert len(written) == 1 and not written[0].exists()
  assert set(buckets.files_below(url)) == {"a", "dataset_info.json", "card.json"}
  with pytest.raises(UserError, match="holds a data set"):
    files.publish(write, url, mark=INFO)


def test_a_missing_bucket_is_refused_before_data_are_prepared(tmp_path, bucket, monkeypatch):
  """Data prepared for a mistyped bucket would be prepared again for the right one."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with pytest.raises(UserError, match="cannot write --out=gs://missing/data"):
    files.publish(lambda folder: pytest.fail("it was prepared"), "gs://missing/data", mark=INFO)
  assert not list(tmp_path.iterdir())


def test_a_copy_is_made_once_and_again_if_the_data_have_changed(tmp_path, url, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  contents = {
    "dataset_info.json": "info",
    "a-train.array_record-00000-of-00001": "train",
    "a-test.array_record-00000-of-00001": "test",
  }
  for name, text in contents.items():
    (buckets.path(url) / name).write_text(text)
  times = {}

  def copy(split=None):
    shards._copied.cache_clear()
    folder = pathlib.Path(shards.folder_of(url, split=split))
    copies_by_name = {path.name: path for path in folder.iterdir() if path.name in contents}
    before = times.copy()
    times.update({name: path.stat().st_mtime_ns for name, path in copies_by_name.items()})
    downloaded[:] = sorted(name for name in copies_by_name if times[name] != before.get(name))
    return {name: path.read_text() for name, path in copies_by_name.items()}

  downloaded: list[str] = []
  assert copy() == {"dataset_info.json": "info"}
  assert shards.folder_of(url.replace("//bucket", "//bucket/")) == shards.folder_of(f"{url}/")
  assert copy("train") == {name: text for name, text in contents.items() if "test" not in name}
  assert downloaded == ["a-train.array_record-00000-of-00001"]
  copy("train")
  assert not downloaded
  (buckets.path(url) / "a-train.array_record-00000-of-00001").write_text("other")
  assert copy("train")["a-train.array_record-00000-of-00001"] == "other"
  assert downloaded == ["a-train.array_record-00000-of-00001"]


def test_a_copy_that_arrives_damaged_is_not_kept(tmp_path, url, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  (buckets.path(url) / "dataset_info.json").write_text("info")
  checksum = buckets.google_crc32c.Checksum
  with monkeypatch.context() as patched:
    patched.setattr(buckets.google_crc32c, "Checksum", lambda: checksum(b"a flipped bit"))
    with pytest.raises(Gone, match="dataset_info.json arrived damaged"):
      shards.folder_of(url)
  assert (pathlib.Path(shards.folder_of(url)) / "dataset_info.json").read_text() == "info"


def test_a_damaged_object_of_a_checkpoint_is_named_without_reading_objects(url, monkeypatch, tmp_path):
  with checkpoint.Checkpointer(url) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, make_state(), make_iterator())
  folder = buckets.path(url) / "checkpoints" / "2"
  with monkeypatch.context() as patched:
    patched.setattr(digests, "_digest", lambda *_: pytest.fail("an object was read"))
    assert digests.damage(folder) is None
    name = next(name for name in buckets.files_below(folder) if name.startswith("params/d/"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"checkpoints/2 cannot be read: {name} holds .*take --step=1, the"):
      restore.restore_params(url)
    (folder / name).write_bytes(whole)
    restore.restore_params(url)
  # On a disk the files are read: no server knows their digests.
  local = tmp_path / "2"
  for name in buckets.files_below(folder):
    (local / name).parent.mkdir(parents=True, exist_ok=True)
    (local / name).write_bytes((folder / name).read_bytes())
  assert digests.damage(local) is None
  (local / "meta" / "metadata").write_bytes(b"{'step': 2}")
  assert digests.damage(local) == digests.Damage("meta/metadata", "holds other bytes than were saved")
