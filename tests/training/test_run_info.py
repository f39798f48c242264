from __future__ import annotations

import contextlib
import json
import shutil

import jax
import pytest
from ml_collections import ConfigDict

from diffdis_jax.config import Run
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes
from diffdis_jax.run import digests, provenance, workdir
from diffdis_jax.training import run_info
from tests import tiny
from tests.raw_pairs import picture, write_tar


def prepared(folder, first: int):
  """Prepare a data set of one pair."""
  write_tar(folder / "raw.tar", {"0.png": picture(first), "0.txt": b"x"})
  prepare([parts.TarPart(folder / "raw.tar", "train")], folder / "data")
  digests.write(folder / "data")
  return str(folder / "data")


@pytest.mark.parametrize("mixture", [False, True])
def test_a_run_resumes_after_its_data_have_been_moved(tmp_path, caplog, mixture):
  """The digests of the records distinguish moved data from other data with equally many records."""
  (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
  first = prepared(tmp_path / "a", 0)
  copy, other = shutil.copytree(first, tmp_path / "copy"), prepared(tmp_path / "b", 1)
  workdir.open_for_training(tmp_path / "run", config_of(first, mixture).to_dict())
  (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
  (tmp_path / "run" / "checkpoints" / "1" / "commit_success.txt").touch()
  run = Run.of(config_of(first, mixture))
  known = {"data": run_info.describe(run.data), "data_digests": run_info.digests_of(run)}
  with provenance.recorded(tmp_path / "run", step=0, is_writer=True, facts=known):
    pass
  field = "data.mixture.one.path" if mixture else "data.path"
  for path, is_same in ((str(copy), True), (other, False)):
    moved = run_info.moved(Run.of(config_of(path, mixture)), str(tmp_path / "run"))
    assert moved == ({field} if is_same else set())
    context = (
      pytest.raises(UserError, match=f"another config: {field} is ") if not is_same else contextlib.nullcontext()
    )
    with context:
      workdir.open_for_training(tmp_path / "run", config_of(path, mixture).to_dict(), moved=moved)
    caplog.clear()
    run_info.log_changes(Run.of(config_of(path, mixture)), str(tmp_path / "run"), before=None, step=1)
    assert sum("the data have changed" in line for line in caplog.messages) == (not is_same)
  assert str(copy) in (tmp_path / "run" / "config.json").read_text()


def config_of(path: str, mixture: bool):
  config = tiny.get_config()
  config.data = ConfigDict({**config.data, "name": "pairs", "path": "" if mixture else path})
  if mixture:
    config.data.mixture = {"one": {"name": "pairs", "path": path}}
  return config


@pytest.mark.parametrize(
  "change, message",
  [
    ({"seed": "3"}, "seed is 3 on host 0 and 0 on host 2; start the same command"),  # as with --config.seed=$RANDOM
    ({"commit": "'other'"}, "commit is 'other' on host 0 and .* on host 2; .* same code, packages and data, on every"),
    ({"data": "'another'"}, "data is 'another' on host 0 and 'shapes, split train' on host 2"),
  ],
)
def test_hosts_with_another_config_or_other_code_are_named(monkeypatch, change, message):
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(jax, "process_index", lambda: 2)
  monkeypatch.setattr(processes, "first_message", lambda message: message)
  first = lambda text: json.dumps(json.loads(text) | change) if text else text
  monkeypatch.setattr(processes, "texts", lambda text: [first(text), first(text), text])
  with pytest.raises(UserError, match=message):
    run_info.check_same_on_all(Run.of(tiny.get_config()))
