"""Where a figure comes from: a checkout's commit, the config's hash, and what a run began from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import tomllib

import jax
import numpy as np
import pytest
from etils import epath

import diffdis_jax
from diffdis_jax.errors import Preempted, UserError
from diffdis_jax.evals import results
from diffdis_jax.run import digests, provenance, workdir
from tests import tiny

pytest_plugins = ("tests.bucket_server",)


def git(folder: pathlib.Path, *arguments: str) -> str:
  command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
  """A repository with a package, and one commit."""
  root = tmp_path / "checkout"
  (root / "diffdis_jax").mkdir(parents=True)
  (root / "diffdis_jax" / "train.py").write_text("a = 1\n")
  (root / "README.md").write_text("one\n")
  git(root, "init", "--quiet")
  git(root, "add", ".")
  git(root, "commit", "--quiet", "--message=first")
  return root


def test_a_checkout_has_its_commit_and_tells_whether_it_is_clean(checkout):
  commit = git(checkout, "rev-parse", "HEAD")
  assert provenance._checkout(checkout) == (commit, True)
  (checkout / "RUN").mkdir()
  (checkout / "RUN" / "metrics.jsonl").write_text("{}\n")
  assert provenance._checkout(checkout) == (commit, True)  # a run is no code
  (checkout / "README.md").write_text("two\n")
  assert provenance._checkout(checkout) == (commit, False)
  (checkout / "README.md").write_text("one\n")
  assert provenance._checkout(checkout) == (commit, True)
  (checkout / "diffdis_jax" / "new.py").write_text("")
  assert provenance._checkout(checkout) == (commit, False)


def test_a_worktree_has_its_own(checkout, tmp_path):
  git(checkout, "worktree", "add", "--quiet", str(tmp_path / "tree"))
  (tmp_path / "tree" / "README.md").write_text("two\n")
  git(tmp_path / "tree", "commit", "--quiet", "--all", "--message=second")
  found = provenance._checkout(tmp_path / "tree")
  assert found == (git(tmp_path / "tree", "rev-parse", "HEAD"), True) != provenance._checkout(checkout)


def test_what_is_no_checkout_has_no_commit(checkout, tmp_path, monkeypatch):
  inside = checkout / "venv" / "site-packages"  # a wheel's place, in somebody's own repository
  (inside / "diffdis_jax").mkdir(parents=True)
  assert provenance._checkout(inside) == (None, None)
  empty = tmp_path / "empty"
  (empty / "diffdis_jax").mkdir(parents=True)
  git(empty, "init", "--quiet")
  assert provenance._checkout(empty) == (None, None)
  monkeypatch.setenv("PATH", str(tmp_path))
  assert provenance._checkout(checkout) == (None, None)  # without git


def test_a_host_of_a_pod_has_the_commit_that_was_copied_there(tmp_path):
  (tmp_path / ".commit").write_text("f" * 40 + "\n")
  assert provenance._checkout(tmp_path) == ("f" * 40, True)


def test_an_image_has_the_commit_that_it_was_built_with(checkout, tmp_path):
  """By the Dockerfile's own command, with what `git describe` says as its first lines have it."""
  dockerfile = (pathlib.Path(__file__).parents[2] / "Dockerfile").read_text()
  (says,) = re.findall(r"COMMIT=\$\((git .+)\) ", dockerfile)
  (command,) = re.findall(r"^ARG COMMIT=\nRUN (.+)$", dockerfile, re.M)
  described = lambda: subprocess.run(["sh", "-c", says], cwd=checkout, capture_output=True, text=True).stdout.strip()
  build = lambda commit: subprocess.run(["sh", "-c", command], cwd=tmp_path, env={"COMMIT": commit}, check=True)
  build("")
  assert provenance._checkout(tmp_path) == (None, None)
  head = git(checkout, "rev-parse", "HEAD")
  git(checkout, "tag", "v1")
  build(described())
  assert provenance._checkout(tmp_path) == (head, True)
  (checkout / "README.md").write_text("changed\n")
  build(described())
  assert provenance._checkout(tmp_path) == (head, False)


def test_the_version_is_that_of_pyproject_also_where_nothing_is_installed(monkeypatch):
  root = pathlib.Path(diffdis_jax.__file__).parents[1]
  expected = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
  assert diffdis_jax.__version__ == expected

  def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", missing)
  assert diffdis_jax._version() == expected


def test_it_has_versions_device_and_processors():
  found = provenance.provenance({"seed": 4})
  assert found["versions"] == {
    "diffdis_jax": diffdis_jax.__version__,
    "jax": jax.__version__,
    "numpy": np.__version__,
  }
  assert found["device"] == {"kind": "cpu", "count": 8} and found["run"] == {"seed": 4}
  assert found["processors"] == len(os.sched_getaffinity(0))
  assert found.keys() == {"commit", "clean", "versions", "device", "processors", "run"}


def write_run(path: epath.PathLike, *, steps: int, began_from: str = "", recorded: bool = True, **changes) -> str:
  """A workdir of so many finished steps. `recorded`: with a history; an import has none."""
  config = tiny.get_config()
  config.update(init_from=began_from, **changes)
  folder = workdir.open_for_training(str(path), config.to_dict())
  if recorded:
    facts = {"commit": "a" * 40, "clean": True, "init_from": provenance.behind(began_from)}
    with provenance.recorded(str(path), step=0, is_writer=True, facts=facts):
      pass
  saved = workdir.checkpoints(folder) / str(steps)
  saved.mkdir(parents=True)
  (saved / digests.COMMIT_MARK).write_text("")
  return str(path)


def test_a_config_has_one_hash_wherever_its_run_and_data_lie(tmp_path):
  config = tiny.get_config()
  there = provenance.of_run(write_run(tmp_path / "run", steps=8), step=8)
  assert provenance.of_config(config.to_dict()) == there | {"steps": 0, "commits": [], "clean": None}
  assert there["seed"] == 0 and there["objectives"] == ["generation", "discrimination"]
  hashes = {there["config_hash"]}
  for path, base in (("/data/emoji", 1), ("gs://bucket/emoji/", 1), ("emoji", 1), ("icons", 2)):
    config.data.path = path
    hashes.add(provenance.of_config(config.to_dict())["config_hash"])
    assert len(hashes) == 1 + base
  config.update(log_every=1, init_from="/somewhere")
  assert provenance.of_config(config.to_dict())["config_hash"] in hashes
  config.seed = 1
  assert (
    provenance.of_config(config.to_dict())["config_hash"] not in hashes
    and provenance.of_config(config.to_dict())["seed"] == 1
  )


def chain(first: epath.PathLike, second: epath.PathLike, third: epath.PathLike) -> str:
  """Three runs, of which each begins from the one before."""
  first = write_run(first, steps=20, objectives=("reconstruction",))
  second = write_run(second, steps=30, began_from=first, objectives=("generation",), seed=2)
  return write_run(third, steps=40, began_from=second)


def check_chain(found: dict) -> None:
  assert [link["steps"] for link in (found, *found["init_from"])] == [40, 30, 20]
  assert [link["seed"] for link in (found, *found["init_from"])] == [0, 2, 0]
  assert [link["objectives"] for link in found["init_from"]] == [["generation"], ["reconstruction"]]
  assert len({link["config_hash"] for link in (found, *found["init_from"])}) == 3
  assert all(link["commits"] == ["a" * 40] and link["clean"] is True for link in (found, *found["init_from"]))
  assert json.loads(json.dumps(found)) == found


def test_the_chain_is_known_without_the_folders(tmp_path):
  last = chain(tmp_path / "a", tmp_path / "b", tmp_path / "c")
  before = provenance.of_run(last, step=40)
  check_chain(before)
  (tmp_path / "b" / "checkpoints" / "99").mkdir()
  (tmp_path / "b" / "checkpoints" / "99" / digests.COMMIT_MARK).write_text("")
  shutil.rmtree(tmp_path / "a")
  assert provenance.of_run(last, step=40) == before  # whatever b does afterwards
  shutil.rmtree(tmp_path / "b")
  assert provenance.of_run(last, step=40) == before
  with provenance.recorded(last, step=40, is_writer=True, facts={"commit": "b" * 40, "clean": False}):
    pass  # it continues
  after = provenance.of_run(last, step=50)
  assert after == before | {"steps": 50, "commits": ["a" * 40, "b" * 40], "clean": False}


def test_an_import_says_of_what(tmp_path):
  imported = write_run(tmp_path / "sd", steps=0, recorded=False)
  (tmp_path / "sd" / "import.json").write_text('{"source": "/data/models/v1-5.safetensors",\n "loaded": {}}')
  (link,) = provenance.behind(imported)
  assert (link["imported"], link["steps"]) == ("v1-5.safetensors", 0)
  assert "imported" not in provenance.of_run(write_run(tmp_path / "run", steps=1), step=1)


def test_runs_may_lie_in_a_bucket(bucket):
  found = provenance.of_run(chain(f"{bucket}/p/a", f"{bucket}/p/b", f"{bucket}/p/c"), step=40)
  check_chain(found)
  assert "bucket" not in json.dumps(found)


@pytest.mark.parametrize(
  "text, shown",
  [
    ("/data/sd/v1.ckpt", "v1.ckpt"),
    ("/data", "data"),
    ("gs://bucket/runs/mine", "mine"),
    ("/a/configs/emoji.py:path=/data/emoji,gamma=0.3", "emoji.py:path=emoji,gamma=0.3"),
    ("prompted of /data/coco", "prompted of coco"),
    ("/home/Max Müller/my runs/v1.ckpt", "v1.ckpt"),
    ("/my disk/emoji.py:path=/data/my set/emoji,gamma=0.3", "emoji.py:path=emoji,gamma=0.3"),
    ("gs://bucket/my runs/mine", "mine"),
    ("prompted of /data/coco or runs/b", "prompted of coco or runs/b"),
    ("runs/demo/diffdis", "runs/demo/diffdis"),
    ("hf:ORG/NAME@main", "hf:ORG/NAME@main"),
    ("test/acc1", "test/acc1"),
    ("a {} and/or a / b", "a {} and/or a / b"),
    (r"^autoencoder|\.(scale|bias)$", r"^autoencoder|\.(scale|bias)$"),
    ({"a": ("/x/y", 1, None)}, {"a": ["y", 1, None]}),
  ],
)
def test_no_path_of_a_machine_is_told(text, shown):
  assert provenance.public(text) == shown


def test_together_each_value_stands_once():
  one = {"commit": "b", "clean": True, "versions": {"jax": "1"}, "device": {"kind": "cpu", "count": 1}, "processors": 2}
  other = one | {"commit": "a", "processors": 4}
  found = results.together([{"provenance": one}, {"provenance": other}, {"provenance": one}])
  assert found == {
    "commits": ["a", "b"],
    "clean": True,
    "versions": [one["versions"]],
    "devices": [one["device"]],
    "processors": [2, 4],
  }
  assert results.together([{"provenance": one}, {}])["clean"] is False
  assert results.together([{"provenance": one}, {}])["commits"] == ["b", None]
  assert results.together([])["clean"] is None


def record(folder, *, step=0, error=None, facts=None):
  with provenance.recorded(folder, step=step, is_writer=True, facts=facts or {}):
    if error:
      raise error


def test_each_start_says_where_the_run_was_and_each_end_why(tmp_path):
  record(tmp_path, facts={"devices": 8})
  (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"step": 6, "loss": 2.0}\n{"step": 7, "lo')
  written = (tmp_path / "metrics.jsonl").stat().st_mtime
  for error in (Preempted(), UserError("too hot"), ZeroDivisionError("a bug")):
    with pytest.raises(type(error)):
      record(tmp_path, step=5, error=error)
  events = provenance.read(tmp_path)
  assert [event["event"] for event in events] == ["start", "end"] * 4
  first, second = events[0], events[2]
  assert (first["step"], first["devices"]) == (0, 8) and "reached" not in first
  assert (second["step"], second["reached"]) == (5, 6) and second["until"] == pytest.approx(written, abs=1.0)
  assert [event["why"] for event in events[1::2]] == ["finished", "stopped", "failed", "failed"]
  assert [event.get("message") for event in events[1::2]] == [None, None, "too hot", "ZeroDivisionError: a bug"]
  assert events[-1]["time"] >= first["time"] > 1.7e9


def test_a_line_that_was_cut_off_does_not_swallow_the_next_one(tmp_path):
  record(tmp_path)
  with (tmp_path / provenance.HISTORY).open("a") as file:
    file.write('{"event": "start", "ti')
  record(tmp_path, step=3)
  events = provenance.read(tmp_path)
  assert [(event["event"], event.get("step")) for event in events] == [
    ("start", 0),
    ("end", None),
    ("start", 3),
    ("end", None),
  ]


@pytest.mark.parametrize("line", ["", "{", "3", "[]", '{"step": 1'])
def test_what_is_no_object_is_an_empty_one(line):
  assert provenance.parse(line) == {}
  assert provenance.parse(json.dumps({"step": 1})) == {"step": 1}


def test_lines_of_metrics_that_cannot_be_read_are_counted(caplog):
  """Not the last one, which may be cut off."""
  lines = [
    '{"step": 3, "loss": 1, "bad": null, "note": "x"}',
    "[1]",
    '{"step": "x"}',
    '{"step": true}',
    '{"step": 4, "lo',
  ]
  assert provenance.metrics_of(lines) == [{"step": 3, "loss": 1, "bad": None}, {}, {}, {}, {}]
  assert caplog.messages == ["metrics.jsonl has 3 lines that cannot be read; they are left out"]


def test_bytes_that_are_no_text_cost_their_line_alone(tmp_path):
  record(tmp_path)
  with (tmp_path / provenance.HISTORY).open("ab") as file:
    file.write(b"\xff\xfe\x00\n")
  record(tmp_path, step=3)
  assert [event.get("step") for event in provenance.read(tmp_path)] == [0, None, 3, None]
