from __future__ import annotations

import contextlib
import json
import shlex
import shutil

import jax
import pytest
from absl import logging
from ml_collections import ConfigDict

from diffdis_jax import __main__ as main_module
from diffdis_jax.config import Run
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import processes
from diffdis_jax.run import digests, provenance, workdir
from diffdis_jax.training import run_info
from tests import tiny, tiny_clip
from tests.raw_pairs import picture, write_tar


@pytest.mark.parametrize(
  "config, next_one",
  [
    (tiny.get_config("autoencoder"), "--config.init_from="),
    (tiny.get_config(), "diffdis generate --workdir="),
    (tiny_clip.get_config(), "diffdis evaluate --workdir="),
  ],
)
def test_a_finished_run_says_where_its_results_are_and_what_to_type_next(tmp_path, caplog, config, next_one):
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  run, path = Run.of(config), str(tmp_path / "a run")
  run_info.log_end(run, path)
  where, second, third = caplog.messages
  assert where == f"finished at step {run.num_steps}: metrics and samples in {path}"
  assert next_one in second and "diffdis report --workdir=" in third
  # What it says can be typed, though the folder's name has a space.
  for line in (second, third):
    words = shlex.split(line.split(": ", 1)[1])
    assert f"--workdir={path}" in words or f"--config.init_from={path}" in words
    if not words[0].startswith("--config.init_from="):
      assert words[0] == "diffdis" and words[1] in main_module.commands()


def test_a_run_that_resumes_with_other_data_says_so(tmp_path, monkeypatch, caplog):
  run = Run.of(tiny.get_config())
  said = lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  run_info.log_changes(run, str(tmp_path), before=None, step=1)  # without a history
  for lines in (["shapes, split train: 8 records"], run_info.describe(run.data)):
    with provenance.recorded(tmp_path, step=0, is_writer=True, facts={"data": lines}):
      pass
  run_info.log_changes(run, str(tmp_path), before=None, step=1)
  assert said() == []
  monkeypatch.setattr(run_info, "describe", lambda data: ["shapes, split train: 9 records"])
  run_info.log_changes(run, str(tmp_path), before=None, step=1)
  (line,) = said()
  assert "since the last start: ['shapes, split train'] then, ['shapes, split train: 9 records'] now; the order" in line


def prepared(folder, first: int):
  """A prepared data set of one pair, as `prepare_data` leaves it."""
  write_tar(folder / "raw.tar", {"0.png": picture(first), "0.txt": b"x"})
  prepare([parts.TarPart(folder / "raw.tar", "train")], folder / "data")
  digests.write(folder / "data")
  return str(folder / "data")


@pytest.mark.parametrize("mixture", [False, True])
def test_a_run_goes_on_where_its_data_have_been_moved(tmp_path, caplog, mixture):
  """They are the same by the digests of their records; others with as many records are not."""
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
  for path, may in ((str(copy), True), (other, False)):
    moved = run_info.moved(Run.of(config_of(path, mixture)), str(tmp_path / "run"))
    assert moved == ({field} if may else set())
    allowed = pytest.raises(UserError, match=f"another config: {field} is ") if not may else contextlib.nullcontext()
    with allowed:
      workdir.open_for_training(tmp_path / "run", config_of(path, mixture).to_dict(), moved=moved)
    caplog.clear()
    run_info.log_changes(Run.of(config_of(path, mixture)), str(tmp_path / "run"), before=None, step=1)
    assert sum("the data have changed" in line for line in caplog.messages) == (not may)
  assert str(copy) in (tmp_path / "run" / "config.json").read_text()


def config_of(path: str, mixture: bool):
  config = tiny.get_config()
  config.data = ConfigDict({**config.data, "name": "pairs", "path": "" if mixture else path})
  if mixture:
    config.data.mixture = {"one": {"name": "pairs", "path": path}}
  return config


@pytest.mark.parametrize("measured", [False, True])
def test_hosts_with_as_many_records_of_another_preparation_are_named(tmp_path, monkeypatch, measured):
  """On a disk of each host, by one path. They were described alike, and each read its rows of an order of its own."""
  config = config_of(str(tmp_path / "data"), mixture=False)
  if measured:  # and not trained on
    config.data = tiny.get_config().data
    data = {"name": "pairs", "path": str(tmp_path / "data"), "split": "train", "image_size": config.image_size}
    config.evals, config.train_evals = {"held": {"task": "retrieval", "data": data}}, ("held",)
  hosts = []  # what each of them tells
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "texts", lambda text: hosts.append(text) or [text, text])
  for name, first in (("host_0", 0), ("host_1", 1), ("host_2", 0)):
    (tmp_path / name).mkdir()
    prepared(tmp_path / name, first)
    (tmp_path / name / "data").rename(tmp_path / "data")
    run_info.check_same_on_all(Run.of(config))
    shutil.rmtree(tmp_path / "data")
  first, other, same = hosts[::2]  # beside each that there is no message
  assert first != other and first == same


@pytest.mark.parametrize(
  "change, said",
  [
    ({"seed": "3"}, "seed is 3 on host 0 and 0 on host 2; start the same command"),  # as by --config.seed=$RANDOM
    ({"save_every": "7"}, "save_every is 7 on host 0 and .* on host 2;"),
    ({"commit": "'other'"}, "commit is 'other' on host 0 and .* on host 2; .* same code, packages and data, on every"),
    ({"data": "'another'"}, "data is 'another' on host 0 and 'shapes, split train' on host 2"),
  ],
)
def test_hosts_with_another_config_or_other_code_are_named(monkeypatch, change, said):
  """Each made its own parameters and its own order of the data, and none said so."""
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(jax, "process_index", lambda: 2)
  monkeypatch.setattr(processes, "first_message", lambda message: message)
  first = lambda text: json.dumps(json.loads(text) | change) if text else text
  monkeypatch.setattr(processes, "texts", lambda text: [first(text), first(text), text])
  with pytest.raises(UserError, match=said):
    run_info.check_same_on_all(Run.of(tiny.get_config()))
