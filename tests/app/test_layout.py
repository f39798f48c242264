"""Which tabs the page has, by the run that it serves."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from configs import diffdis_cc3m
from diffdis_jax.app.search import Index
from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.config import Run
from tests import steps, tiny, tiny_clip
from tests.app.test_answers import Source
from tests.app.test_answers import StepSampler as TabsSampler
from tests.models.networks import random_params

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]  # of Gradio's own imports


def built(config, *, source: Source | None):
  """The page, as Gradio has it."""
  from diffdis_jax.app import page

  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=2)
  sampler = StepSampler(inference, random_params(inference.shapes, seed=0), seconds=300)
  index = None if source is None else Index(sampler, source, None)
  blocks = page.build(sampler, index, Run.of(config), "a run")
  sampler.close()
  return blocks


def components(config, *, source: Source | None) -> list[dict]:
  return built(config, source=source).get_config_file()["components"]


def tabs(config, *, source: Source | None) -> list[str]:
  return [each["props"]["label"] for each in components(config, source=source) if each["type"] == "tabitem"]


def config_of(*objectives: str):
  config = tiny.get_config()
  config.objectives = objectives
  return config


@pytest.mark.parametrize(
  "config, expected",
  [
    (config_of("generation", "discrimination"), ["Generate", "Classify", "Search"]),
    (config_of("generation"), ["Generate"]),
    (config_of("discrimination"), ["Classify", "Search"]),
    (tiny_clip.get_config(), ["Classify", "Search"]),
  ],
  ids=["both", "generation", "discrimination", "clip"],
)
def test_a_run_has_the_tabs_that_it_can_serve(config, expected):
  assert tabs(config, source=Source("red", "blue")) == expected


def test_the_page_begins_with_values_that_it_takes():
  config = config_of("generation")
  config.inference.update(generation_steps=250, generation_guidance=31.0)
  sliders = [each["props"] for each in components(config, source=None) if each["type"] == "slider"]
  assert {each["label"] for each in sliders} >= {"Steps", "Guidance"}
  assert all(each["value"] <= each["maximum"] for each in sliders)


def field(config, label: str) -> str:
  return next(each["props"]["value"] for each in components(config, source=None) if each["props"].get("label") == label)


def test_the_template_is_the_plain_prompt_where_a_run_measures_by_eighty():
  evals = Run.of(diffdis_cc3m.get_config("runlocal,imagenet=I")).evals["imagenet"]
  config = config_of("discrimination")
  config.evals.test.update({name: evals[name] for name in ("templates", "single_template") if name in evals})
  assert evals["templates"][0] != "a photo of a {}." == field(config, "Template")


@pytest.mark.parametrize(
  "classnames, expected",
  [
    (("a cat", "a dog"), "a cat, a dog"),
    ("names.json", "cat, dog, horse"),
    (tuple(f"class {i}" for i in range(201)), "cat, dog, horse"),
    (("crane, bird", "dog"), "cat, dog, horse"),
  ],
  ids=["names", "a file", "too many", "a comma"],
)
def test_the_class_names_are_the_runs_own_where_the_page_takes_them(classnames, expected):
  from diffdis_jax.app import page

  evals = {"test": {"task": "zero_shot", "classnames": classnames}}
  run = dataclasses.replace(Run.of(tiny.get_config()), evals=evals, train_evals=())
  assert page._Tabs(TabsSampler(), None, run)._names().value == expected


def test_without_a_folder_there_is_nothing_to_search():
  assert tabs(config_of("discrimination"), source=None) == ["Classify"]


def test_uploads_are_kept_for_ten_minutes_at_most():
  """What is too old by then goes at the next look."""
  every, age = built(config_of("generation"), source=None).delete_cache
  assert every + age <= 600


def test_an_address_in_the_place_of_a_file_is_never_fetched(monkeypatch):
  """Gradio would do so in a field of any kind, whatever the file's size."""
  import gradio
  from gradio import processing_utils

  async def get(url, **how):
    pytest.fail(f"{url} was fetched")

  monkeypatch.setattr(processing_utils, "async_ssrf_protected_get", get)
  blocks = built(config_of("discrimination"), source=None)
  function = next(each for each in blocks.fns.values() if each.api_name == "classify")
  file = {"path": "https://example.com/large.png", "meta": {"_type": "gradio.FileData"}}
  for inputs in ([file, "a, b", "{}", 0], [None, [file], "{}", 0]):
    with pytest.raises(gradio.Error, match="not as an address"):
      asyncio.run(blocks.preprocess_data(function, inputs, None))


def test_neither_title_nor_manifest_shows_a_folder(tmp_path):
  blocks = built(config_of("generation"), source=None)
  assert blocks.title == "DiffDis: a run"
  assert str(tmp_path) not in json.dumps(blocks.get_config_file())
