from __future__ import annotations

import json
import pathlib
import random
import re
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffdis_jax.config import Run, base, load, with_evals
from diffdis_jax.errors import UserError
from diffdis_jax.run import workdir
from tests import tiny, tiny_clip, tiny_lt

SECTION = '{"name": "birds", "task": "zero_shot", "data": {"path": "BIRDS", "split": "val"}, "templates": ["a {}"]}'


def make_config() -> ConfigDict:
  config = base(ConfigDict(dict(width=8)), image_size=32)
  config.evals = dict(test=dict(task="retrieval"))
  config.train_evals = ("test",)
  return config.lock()


def test_changed_fields_are_checked_with_the_rest():
  run = Run.of(tiny.get_config())
  assert run.replace({"inference.steps": 3, "seed": 7}).inference.steps == 3
  with pytest.raises(UserError, match="unknown config key inference.step; did you mean"):
    run.replace({"inference.step": 3})


def test_evaluations_are_added_and_nothing_else_is_changed():
  config = make_config()
  added = with_evals(config, [SECTION, '{"name": "drawn", "task": "generation_accuracy", "per_class": 2}'])
  assert added.is_locked and added.train_evals == ("test", "birds", "drawn")
  assert added.evals.drawn.to_dict() == {"task": "generation_accuracy", "per_class": 2}
  assert added.evals.birds.data.to_dict() == {"name": "pairs", "image_size": 32, "path": "BIRDS", "split": "val"}
  assert list(added.evals.birds.templates) == ["a {}"] and "name" not in added.evals.birds
  assert added.evals.test == config.evals.test and config.train_evals == ("test",)
  rest = lambda config: {name: value for name, value in config.to_dict().items() if "evals" not in name}
  assert rest(added) == rest(config)


@pytest.mark.parametrize(
  "texts, message",
  [
    (["{"], "--eval={ is not JSON: "),
    (['{"name": "a"}'], "should be an object with a task and a name"),
    (['{"name": "a/b", "task": "retrieval"}'], "a name of letters, digits, - and _, "),
    ([SECTION, SECTION], "which no evaluation of the config has"),
  ],
)
def test_a_wrong_eval_flag_is_refused_in_one_line(texts, message):
  with pytest.raises(UserError, match=message) as error:
    with_evals(make_config(), texts)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("objectives", 3, r"objectives is 3; it must be a sequence, such as \('generation', 'discrimination'\)"),
    ("model.unet", 3, "model.unet is 3; it must be a section"),
    ("model.unet.attention", ["yes"], r"model.unet.attention\[0\] is 'yes'; it must be True or False"),
    ("model.alignment.depth", 2.5, "model.alignment.depth is 2.5; it must be a whole number"),
    ("seed", True, "seed is True; it must be a whole number"),
    ("evals.test.task", 5, "evals.test.task is 5; it must be a text"),
    ("inference", None, "inference is None; it must be a section"),
    ("optim.groups", [["a"]], r"optim.groups\[0\] is \('a',\); it must have 2 elements"),
    ("train_evals", [3], r"train_evals\[0\] is 3; it must be a text"),
    ("sede", 1, r"unknown config key sede; did you mean seed\?"),
  ],
)
def test_a_field_of_a_wrong_type_or_name_is_refused_in_one_line(tmp_path, field, value, message):
  fields = tiny_fields()
  section_of(fields, field)[field.split(".")[-1]] = value
  (tmp_path / "config.json").write_text(json.dumps(fields))
  with pytest.raises(UserError, match=f"config.json: {message}") as error:
    load(tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "field, value",
  [
    ("evals.test.classnames", pathlib.Path("names.json")),
    ("evals.test.num_images", np.int64(5)),
    ("evals.test.classnames", np.array(["cat", "dog"])),
    ("data.mixture", {"own": {"path": pathlib.Path("birds")}}),
  ],
)
def test_values_that_json_cannot_hold_are_refused_at_once(field, value):
  """A user's config file may hold any object."""
  fields = tiny.get_config().to_dict()
  section_of(fields, field)[field.split(".")[-1]] = value
  with pytest.raises(UserError, match=rf"^{field}[.\w]* has .*, which config.json cannot hold; give texts, numbers"):
    Run.of(fields)


def tiny_fields() -> dict[str, Any]:
  return json.loads(tiny.get_config().to_json())


def section_of(fields: dict[str, Any], path: str) -> dict[str, Any]:
  for name in path.split(".")[:-1]:
    fields = fields[name]
  return fields


def test_no_field_of_config_json_may_be_missing():
  given = re.compile(r"evals\.|optim\.rates\.|data\.seed$")  # the config chooses these names
  for field in [*workdir.flatten(tiny_fields()), "inference", "evals", "optim.rates", "evals.test.task"]:
    if field == "evals.test.task" or not given.match(field):
      fields = tiny_fields()
      del section_of(fields, field)[field.split(".")[-1]]
      with pytest.raises(UserError, match=f"{field} is missing; every config of a run has it"):
        Run.of(fields)


def test_a_config_read_back_is_equal(tmp_path):
  for config in (tiny.get_config(), tiny.get_config("autoencoder"), tiny_clip.get_config(), tiny_lt.get_config()):
    (tmp_path / "config.json").write_text(config.to_json())
    assert load(tmp_path).to_dict() == config.to_dict() == Run.of(config).to_dict()


def test_every_flipped_bit_of_config_json_is_refused(tmp_path):
  fields, file, random_ = tiny_fields(), tmp_path / "config.json", random.Random(0)
  workdir.open_for_training(tmp_path, fields)
  assert load(tmp_path).seed == fields["seed"]
  whole = file.read_bytes()
  for _ in range(200):
    flipped = bytearray(whole)
    flipped[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
    file.write_bytes(flipped)
    with pytest.raises(UserError) as error:
      load(tmp_path)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_an_edited_config_json_is_read_once_its_digest_is_removed(tmp_path):
  fields, file = tiny_fields(), tmp_path / "config.json"
  workdir.open_for_training(tmp_path, fields)
  edited = json.loads(file.read_text()) | {"seed": 123}
  file.write_text(json.dumps(edited))
  with pytest.raises(UserError, match='was edited; .* or remove its line "digest" to use it as it is'):
    load(tmp_path)
  del edited["digest"]
  file.write_text(json.dumps(edited))
  assert load(tmp_path).seed == 123
