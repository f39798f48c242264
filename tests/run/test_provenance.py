"""Test that a result's provenance has the commit, the config's hash, and the runs that the run started from."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tomllib

import jax
import numpy as np
import pytest
from etils import epath

import diffdis_jax
from diffdis_jax.errors import Preempted, UserError
from diffdis_jax.run import digests, provenance, workdir
from tests import tiny


def git(folder: pathlib.Path, *arguments: str) -> str:
  command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
  """Make a repository with a package and one commit."""
  root = tmp_path / "checkout"
  (root / "diffdis_jax").mkdir(parents=True)
  (root / "diffdis_jax" / "train.py").write_text("a = 1\n")
  (root / "README.md").write_text("one\n")
  git(root, "init", "--quiet")
  git(root, "add", ".")
  git(root, "commit", "--quiet", "--message=first")
  return root


def test_a_checkout_has_a_commit_and_is_clean_or_not(checkout):
  commit = git(checkout, "rev-parse", "HEAD")
  assert provenance._checkout(checkout) == (commit, True)
  (checkout / "RUN").mkdir()
  (checkout / "RUN" / "metrics.jsonl").write_text("{}\n")
  assert provenance._checkout(checkout) == (commit, True)  # a run is not code
  (checkout / "README.md").write_text("two\n")
  assert provenance._checkout(checkout) == (commit, False)
  (checkout / "README.md").write_text("one\n")
  (checkout / "diffdis_jax" / "new.py").write_text("")
  assert provenance._checkout(checkout) == (commit, False)


def test_a_folder_without_git_has_the_commit_of_its_commit_file(checkout, tmp_path, monkeypatch):
  inside = checkout / "venv" / "site-packages"  # a wheel that is installed inside a user's repository
  (inside / "diffdis_jax").mkdir(parents=True)
  assert provenance._checkout(inside) == (None, None)
  monkeypatch.setenv("PATH", str(tmp_path))
  assert provenance._checkout(checkout) == (None, None)  # without git
  (tmp_path / ".commit").write_text("f" * 40 + "\n")  # on a host of a pod
  assert provenance._checkout(tmp_path) == ("f" * 40, True)


def test_a_record_has_versions_device_and_processors():
  record = provenance.provenance({"seed": 4})
  root = pathlib.Path(diffdis_jax.__file__).parents[1]
  version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
  assert record["versions"] == {"diffdis_jax": version, "jax": jax.__version__, "numpy": np.__version__}
  assert record["device"] == {"kind": "cpu", "count": 8} and record["run"] == {"seed": 4}
  assert record["processors"] == len(os.sched_getaffinity(0))
  assert record.keys() == {"commit", "clean", "versions", "device", "processors", "run"}


def write_run(path: epath.PathLike, *, steps: int, began_from: str = "", recorded: bool = True, **changes) -> str:
  """Write a workdir with `steps` finished steps. It has a history if `recorded`; imports have none."""
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


def test_the_hash_of_a_config_ignores_the_folders_of_run_and_data(tmp_path):
  config = tiny.get_config()
  of_run = provenance.of_run(write_run(tmp_path / "run", steps=8), step=8)
  assert provenance.of_config(config.to_dict()) == of_run | {"steps": 0, "commits": [], "clean": None}
  assert of_run["seed"] == 0 and of_run["objectives"] == ["generation", "discrimination"]
  hashes = {of_run["config_hash"]}
  for path, base in (("/data/emoji", 1), ("gs://bucket/emoji/", 1), ("emoji", 1), ("icons", 2)):
    config.data.path = path
    hashes.add(provenance.of_config(config.to_dict())["config_hash"])
    assert len(hashes) == 1 + base
  config.update(log_every=1, init_from="/somewhere")
  assert provenance.of_config(config.to_dict())["config_hash"] in hashes
  config.seed = 1
  assert provenance.of_config(config.to_dict())["config_hash"] not in hashes


def test_the_chain_of_starts_is_known_without_their_folders(tmp_path):
  first = write_run(tmp_path / "a", steps=20, objectives=("reconstruction",))
  second = write_run(tmp_path / "b", steps=30, began_from=first, objectives=("generation",), seed=2)
  last = write_run(tmp_path / "c", steps=40, began_from=second)
  before = provenance.of_run(last, step=40)
  links = (before, *before["init_from"])
  assert [(link["steps"], link["seed"]) for link in links] == [(40, 0), (30, 2), (20, 0)]
  assert [link["objectives"] for link in links[1:]] == [["generation"], ["reconstruction"]]
  assert len({link["config_hash"] for link in links}) == 3
  assert all(link["commits"] == ["a" * 40] and link["clean"] is True for link in links)
  (tmp_path / "b" / "checkpoints" / "99").mkdir()
  (tmp_path / "b" / "checkpoints" / "99" / digests.COMMIT_MARK).write_text("")
  shutil.rmtree(tmp_path / "a")
  assert provenance.of_run(last, step=40) == before  # later steps of run b change nothing
  shutil.rmtree(tmp_path / "b")
  assert provenance.of_run(last, step=40) == before
  with provenance.recorded(last, step=40, is_writer=True, facts={"commit": "b" * 40, "clean": False}):
    pass  # resume the run
  after = provenance.of_run(last, step=50)
  assert after == before | {"steps": 50, "commits": ["a" * 40, "b" * 40], "clean": False}


def test_the_provenance_of_an_import_names_its_source(tmp_path):
  imported = write_run(tmp_path / "sd", steps=0, recorded=False)
  (tmp_path / "sd" / "import.json").write_text('{"source": "/data/models/v1-5.safetensors",\n "loaded": {}}')
  (link,) = provenance.behind(imported)
  assert (link["imported"], link["steps"]) == ("v1-5.safetensors", 0)
  assert "imported" not in provenance.of_run(write_run(tmp_path / "run", steps=1), step=1)


@pytest.mark.parametrize(
  "text, public_text",
  [
    ("/home/Max Müller/my runs/v1.ckpt", "v1.ckpt"),
    ("/my disk/emoji.py:path=/data/my set/emoji,gamma=0.3", "emoji.py:path=emoji,gamma=0.3"),
    ("gs://bucket/my runs/mine", "mine"),
    ("prompted of /data/coco or runs/b", "prompted of coco or runs/b"),
    ("runs/demo/diffdis", "runs/demo/diffdis"),
    ("hf:ORG/NAME@main", "hf:ORG/NAME@main"),
    ("a {} and/or a / b", "a {} and/or a / b"),
    (r"^autoencoder|\.(scale|bias)$", r"^autoencoder|\.(scale|bias)$"),
    ({"a": ("/x/y", 1, None)}, {"a": ["y", 1, None]}),
  ],
)
def test_the_paths_of_a_machine_are_removed(text, public_text):
  assert provenance.public(text) == public_text


def record(folder, *, step=0, error=None, facts=None):
  with provenance.recorded(folder, step=step, is_writer=True, facts=facts or {}):
    if error:
      raise error


def test_each_start_records_the_step_and_each_end_its_cause(tmp_path):
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


@pytest.mark.parametrize("damage", [b'{"event": "start", "ti', b"\xff\xfe\x00\n"])
def test_a_damaged_line_of_the_history_loses_no_other(tmp_path, damage):
  record(tmp_path)
  with (tmp_path / provenance.HISTORY).open("ab") as file:
    file.write(damage)
  record(tmp_path, step=3)
  assert [event["step"] for event in provenance.read(tmp_path) if event.get("event") == "start"] == [0, 3]
