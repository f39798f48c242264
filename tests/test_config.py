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
from diffdis_jax.config.run import default_fields
from diffdis_jax.errors import UserError
from diffdis_jax.run import workdir
from tests import tiny, tiny_clip, tiny_lt

SECTION = '{"name": "birds", "task": "zero_shot", "data": {"path": "BIRDS", "split": "val"}, "templates": ["a {}"]}'


def make_config() -> ConfigDict:
  config = base(ConfigDict(dict(width=8)), image_size=32)
  config.evals = dict(test=dict(task="retrieval"))
  config.train_evals = ("test",)
  return config.lock()


def test_every_field_has_a_default_but_those_that_are_given():
  fields = make_config().to_dict()
  assert fields.keys() - default_fields().keys() == {"image_size", "model"}
  assert {**fields, **default_fields(), "evals": fields["evals"], "train_evals": fields["train_evals"]} == fields


def test_changed_fields_are_checked_with_the_rest():
  run = Run.of(tiny.get_config())
  assert run.replace({"inference.steps": 3, "seed": 7}).inference.steps == 3
  for path, message in (
    ("inference.step", "inference.step; did you mean"),
    ("infrence.steps", "infrence; did you mean inference"),
  ):
    with pytest.raises(UserError, match=f"unknown config key {message}"):
      run.replace({path: 3})


def test_evaluations_are_added_and_nothing_else_is_changed():
  config = make_config()
  merged = with_evals(config, [SECTION, '{"name": "drawn", "task": "generation_accuracy", "per_class": 2}'])
  assert merged.is_locked and merged.train_evals == ("test", "birds", "drawn")
  assert merged.evals.drawn.to_dict() == {"task": "generation_accuracy", "per_class": 2}
  assert merged.evals.birds.data.to_dict() == {"name": "pairs", "image_size": 32, "path": "BIRDS", "split": "val"}
  assert list(merged.evals.birds.templates) == ["a {}"] and "name" not in merged.evals.birds
  assert merged.evals.test == config.evals.test and config.train_evals == ("test",)
  rest = lambda config: {name: value for name, value in config.to_dict().items() if "evals" not in name}
  assert rest(merged) == rest(config)
  assert with_evals(config, []).to_dict() == config.to_dict()


def test_what_is_given_of_the_data_stays():
  text = '{"name": "s", "task": "zero_shot", "data": {"name": "shapes", "image_size": 16}}'
  assert with_evals(make_config(), [text]).evals.s.data.to_dict() == {"name": "shapes", "image_size": 16}


@pytest.mark.parametrize(
  "texts, message",
  [
    (["{"], "--eval={ is not JSON: "),
    (['{"a":' * 20_000], "maximum recursion depth exceeded"),
    (["3"], "--eval=3 should be an object with a task and a name"),
    (['{"name": "a"}'], "should be an object with a task and a name"),
    (['{"task": "retrieval"}'], "should be an object with a task and a name"),
    (['{"name": "a/b", "task": "retrieval"}'], "a name of letters, digits, - and _, "),
    (['{"name": "test", "task": "retrieval"}'], "which no evaluation of the config has"),
    ([SECTION, SECTION], "which no evaluation of the config has"),
  ],
)
def test_mistakes_are_one_line(texts, message):
  with pytest.raises(UserError, match=message) as error:
    with_evals(make_config(), texts)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("objectives", 3, r"objectives is 3; it must be a sequence, such as \('generation', 'discrimination'\)"),
    ("objectives", [1], r"objectives\[0\] is 1; it must be a text"),
    ("model", 3, "model is 3; it must be a section of fields"),
    ("model.unet", 3, "model.unet is 3; it must be a section"),
    ("model.unet.widths", 16, "model.unet.widths is 16; it must be a sequence"),
    ("model.unet.attention", ["yes"], r"model.unet.attention\[0\] is 'yes'; it must be True or False"),
    ("model.fusion", 1, "model.fusion is 1; it must be True or False"),
    ("model.alignment.depth", 2.5, "model.alignment.depth is 2.5; it must be a whole number"),
    ("image_size", "big", "image_size is 'big'; it must be a whole number"),
    ("seed", True, "seed is True; it must be a whole number"),
    ("evals", 5, "evals is 5; it must be a section"),
    ("evals.test", 5, "evals.test is 5; it must be a section"),
    ("evals.test.task", 5, "evals.test.task is 5; it must be a text"),
    ("inference", None, "inference is None; it must be a section"),
    ("data.path", None, "data.path is None; it must be a text"),
    ("optim.groups", [["a"]], r"optim.groups\[0\] is \('a',\); it must have 2 elements"),
    ("optim.groups", ["ab"], r"optim.groups\[0\] is 'ab'; it must be a sequence"),
    ("train_evals", [3], r"train_evals\[0\] is 3; it must be a text"),
  ],
)
def test_a_field_of_another_type_is_one_line(tmp_path, field, value, message):
  fields = json.loads(tiny.get_config().to_json())
  section = fields
  for name in field.split(".")[:-1]:
    section = section[name]
  section[field.split(".")[-1]] = value
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
    ("evals.test.templates", ("a {}", len)),
    ("data.mixture", {"own": {"path": pathlib.Path("birds")}}),
  ],
)
def test_what_json_cannot_hold_is_refused_and_not_at_the_first_write(field, value):
  """A config file of one's own may put anything there."""
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


# Of those the names are the config's own.
FREE = re.compile(r"evals\.|optim\.rates\.|data\.seed$")
FIELDS = [field for field in workdir.flatten(tiny_fields()) if not FREE.match(field)]


@pytest.mark.parametrize("field", [*FIELDS, "inference", "evals", "optim.rates", "evals.test.task"])
def test_a_field_that_is_not_there_is_one_line(field):
  """None is filled in by its default."""
  fields = tiny_fields()
  del section_of(fields, field)[field.split(".")[-1]]
  with pytest.raises(UserError, match=f"{field} is missing; every config of a run has it"):
    Run.of(fields)


@pytest.mark.parametrize(
  "field, answer",
  [
    ("sede", "did you mean seed?"),
  ],
)
def test_an_unknown_field_is_answered_by_the_nearest(tmp_path, field, answer):
  fields = json.loads((tiny_lt if "long_tail" in field or "sampling" in field else tiny).get_config().to_json())
  section_of(fields, field)[field.split(".")[-1]] = 1
  (tmp_path / "config.json").write_text(json.dumps(fields))
  with pytest.raises(UserError, match=re.escape(f"config.json: unknown config key {field}; {answer}")) as error:
    load(tmp_path)
  assert "\n" not in str(error.value)


def test_configs_come_back_equal(tmp_path):
  for config in (tiny.get_config(), tiny.get_config("autoencoder"), tiny_clip.get_config(), tiny_lt.get_config()):
    (tmp_path / "config.json").write_text(config.to_json())
    assert load(tmp_path).to_dict() == config.to_dict() == Run.of(config).to_dict()


def test_no_flipped_bit_of_config_json_is_read_in_silence(tmp_path):
  """Most of 500 flips once loaded as another config, or were a word that nobody looked at."""
  fields, file, random_ = tiny_fields(), tmp_path / "config.json", random.Random(0)
  workdir.open_for_training(tmp_path, fields)
  assert load(tmp_path).seed == fields["seed"]
  whole = file.read_bytes()
  for _ in range(500):
    flipped = bytearray(whole)
    flipped[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
    file.write_bytes(flipped)
    with pytest.raises(UserError) as error:
      load(tmp_path)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_an_edited_config_json_is_read_without_its_digest(tmp_path):
  fields, file = tiny_fields(), tmp_path / "config.json"
  workdir.open_for_training(tmp_path, fields)
  edited = json.loads(file.read_text()) | {"seed": 123}
  file.write_text(json.dumps(edited))
  with pytest.raises(UserError, match='was edited; .* or remove its line "digest" to use it as it is'):
    load(tmp_path)
  del edited["digest"]
  file.write_text(json.dumps(edited))
  assert load(tmp_path).seed == 123
