from __future__ import annotations

import json

import pytest
from ml_collections import ConfigDict, config_dict

from diffdis_jax.config import read_fields
from diffdis_jax.errors import UserError
from diffdis_jax.run import workdir


def make_config(**changes) -> ConfigDict:
  fields = {"seed": 0, "objectives": ("generation",), "batch_size": 64, "log_every": 10, "num_steps": 100, "empty": {}}
  fields |= {"model": {"dtype": "float32"}, "data": {"name": "shapes", "loader": {"num_threads": 2}}}
  fields |= {"optim": {"betas": (0.9, 0.99), "rules": (("unet.*", 1.0), (".*", None))}, "mesh": {"data": 8}}
  fields |= {"evals": {"zero_shot": {"steps": 5}}, "init_from": config_dict.placeholder(str)}
  config = ConfigDict(fields)
  config.update_from_flattened_dict(changes)
  return config


def test_a_config_is_read_back_equal(tmp_path):
  workdir.open_for_training(tmp_path / "run", make_config().to_dict())
  loaded = read_fields(tmp_path / "run")
  assert loaded == make_config().to_dict() and loaded["optim"]["betas"] == (0.9, 0.99)
  before = (tmp_path / "run" / "config.json").read_bytes()
  workdir.open_for_training(tmp_path / "run", make_config().to_dict())
  assert (tmp_path / "run" / "config.json").read_bytes() == before
  assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]


@pytest.mark.parametrize(
  "field, value", [("log_every", 1), ("data.loader.num_threads", 8), ("evals.zero_shot.steps", 9), ("mesh.data", 1)]
)
def test_fields_that_may_change_are_updated(tmp_path, field, value):
  workdir.open_for_training(tmp_path, make_config().to_dict())
  workdir.open_for_training(tmp_path, make_config(**{field: value}).to_dict())
  assert read_fields(tmp_path) == make_config(**{field: value}).to_dict()


def commit(path, step: int = 1) -> None:
  """Write the file that marks a checkpoint as complete."""
  folder = path / "checkpoints" / str(step)
  folder.mkdir(parents=True)
  (folder / "commit_success.txt").touch()


def test_another_config_is_refused_with_every_differing_field(tmp_path):
  workdir.open_for_training(tmp_path, make_config().to_dict())
  commit(tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  other = make_config(**{"batch_size": 32, "num_steps": 50, "optim.betas": (0.9, 0.999), "log_every": 1})
  del other.init_from
  with pytest.raises(UserError) as error:
    workdir.open_for_training(tmp_path, other.to_dict())
  message = str(error.value)
  assert "batch_size is 64 there and 32 here" in message
  assert "num_steps is 100 there and 50 here" in message
  assert "optim.betas is (0.9, 0.99) there and (0.9, 0.999) here" in message
  assert "init_from is None there and absent here" in message
  assert "log_every" not in message and "seed" not in message and "\n" not in message
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_with_a_checkpoint_may_get_longer_and_not_shorter(tmp_path):
  workdir.open_for_training(tmp_path, make_config().to_dict())
  longer = make_config(num_steps=150).to_dict()
  assert workdir.lengthened(tmp_path, longer) is None  # a run without a checkpoint may change its config anyway
  commit(tmp_path)
  assert workdir.lengthened(tmp_path, make_config().to_dict()) is None
  assert workdir.lengthened(tmp_path, longer) == 100 and workdir.check_config(tmp_path, longer) == []
  workdir.open_for_training(tmp_path, longer)
  assert read_fields(tmp_path)["num_steps"] == 150
  with pytest.raises(UserError, match="num_steps is 150 there and 100 here; take"):
    workdir.check_config(tmp_path, make_config().to_dict())
  with pytest.raises(UserError, match="another config: batch_size is 64 there and 32 here; take"):
    workdir.check_config(tmp_path, make_config(num_steps=200, batch_size=32).to_dict())


def test_a_run_without_a_checkpoint_may_change_its_config(tmp_path, caplog):
  workdir.open_for_training(tmp_path, make_config().to_dict())
  (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
  (tmp_path / "checkpoints" / "2").mkdir()  # without the mark of a complete checkpoint
  other = make_config(batch_size=32)
  assert workdir.check_config(tmp_path, other.to_dict()) == ["batch_size is 64 there and 32 here"]
  workdir.open_for_training(tmp_path, other.to_dict())
  message = "the config of a run without a checkpoint is replaced: batch_size is 64 there and 32 here"
  assert read_fields(tmp_path) == other.to_dict() and caplog.messages == [message]
  commit(tmp_path, 3)
  with pytest.raises(UserError, match="batch_size is 32 there and 64 here"):
    workdir.open_for_training(tmp_path, make_config().to_dict())


def test_a_folder_without_a_run_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write to --workdir=.*file/run"):
    workdir.open_for_training(tmp_path / "file" / "run", make_config().to_dict())
  with pytest.raises(UserError, match="no folder .*nowhere"):
    read_fields(tmp_path / "nowhere")
  with pytest.raises(UserError, match="no config.json in"):
    read_fields(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"a": 1})[:-1])
  with pytest.raises(UserError, match="config.json is not JSON"):
    read_fields(tmp_path)
  for content in ("{}", '{"model_type": "clip", "data": 1}', "[]"):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is of no training run"):
      read_fields(tmp_path)
