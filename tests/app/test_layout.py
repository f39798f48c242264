"""Test that the page's tabs, initial values and example fit the run that it serves."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from configs import diffdis_cc3m
from diffdis_jax.app.answers import Index
from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.config import Run
from tests import steps, tiny, tiny_clip
from tests.app.test_answers import Source
from tests.app.test_answers import StepSampler as ColourSampler
from tests.models.networks import random_params

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]  # Gradio's own imports warn


def build(config, source: Source | None = None):
  """Build the page of a run that was never trained."""
  from diffdis_jax.app import page

  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=2)
  sampler = StepSampler(inference, random_params(inference.shapes, seed=0), seconds=300)
  index = source and Index(sampler, source, None)
  blocks = page.build(sampler, index, Run.of(config), "a run")
  sampler.closed.set()
  return blocks


def components(config, source: Source | None = None, **expected: str) -> list[dict]:
  """Return the properties of all components whose properties have these values."""
  properties = [
    {**part["props"], "type": part["type"]} for part in build(config, source).get_config_file()["components"]
  ]
  return [part for part in properties if expected.items() <= {name: part.get(name) for name in expected}.items()]


def config_of(*objectives: str):
  config = tiny.get_config()
  config.objectives = objectives
  return config


@pytest.mark.parametrize(
  "config, source, expected",
  [
    (config_of("generation", "discrimination"), Source("red", "blue"), ["Generate", "Classify", "Search"]),
    (config_of("generation"), Source("red", "blue"), ["Generate"]),
    (tiny_clip.get_config(), Source("red", "blue"), ["Classify", "Search"]),
    (config_of("discrimination"), None, ["Classify"]),
  ],
  ids=["both", "generation", "clip", "nothing to search"],
)
def test_a_run_has_the_tabs_that_it_can_serve(config, source, expected):
  assert [tab["label"] for tab in components(config, source, type="tabitem")] == expected


def test_the_page_begins_with_values_that_it_takes():
  config = config_of("generation")
  config.inference.update(generation_steps=250, generation_guidance=31.0)
  sliders = components(config, type="slider")
  assert {slider["label"] for slider in sliders} >= {"Steps", "Guidance"}
  assert all(slider["value"] <= slider["maximum"] for slider in sliders)


def test_an_example_is_drawn_and_classified_before_the_first_click():
  config = config_of("generation", "discrimination")
  config.inference.generation_steps = 2
  by_id = {part.get("elem_id"): part for part in components(config)}
  (gallery,) = components(config, type="gallery")
  assert len(gallery["value"]) == 1 and by_id["draw-line"]["value"] == "1 of 1, seed 0, 2 steps."
  assert by_id["classify-image"]["value"] and "%" in by_id["classify-line"]["value"]
  assert len(by_id["classify-answer"]["value"]["confidences"]) > 1
  # For a run that does not generate, the first of the searched images is the example.
  by_id = {part.get("elem_id"): part for part in components(tiny_clip.get_config(), Source("red"))}
  assert "%" in by_id["classify-line"]["value"] and "send-button" not in by_id


def test_the_template_is_the_plain_prompt_where_a_run_measures_by_eighty():
  evals = Run.of(diffdis_cc3m.get_config("runlocal,imagenet=I")).evals["imagenet"]
  config = config_of("discrimination")
  config.evals.test.update({name: evals[name] for name in ("templates", "single_template") if name in evals})
  (template,) = components(config, label="Template")
  assert evals["templates"][0] != "a photo of a {}." == template["value"]


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
  assert page._Tabs(ColourSampler(), None, run)._names().value == expected


def test_uploads_stay_for_ten_minutes_at_most_and_neither_title_nor_manifest_shows_a_folder(tmp_path):
  blocks = build(config_of("generation"))
  every, age = blocks.delete_cache
  assert every + age <= 600 and blocks.title == "DiffDis: a run"
  assert str(tmp_path) not in json.dumps(blocks.get_config_file())


def test_an_address_in_the_place_of_a_file_is_never_fetched(monkeypatch):
  """Gradio would download an address given for any field, whatever the file's size."""
  import gradio
  from gradio import processing_utils

  async def get(url, **how):
    pytest.fail(f"{url} was fetched")

  monkeypatch.setattr(processing_utils, "async_ssrf_protected_get", get)
  blocks = build(config_of("discrimination"))
  function = next(candidate for candidate in blocks.fns.values() if candidate.api_name == "classify")
  file = {"path": "https://example.com/large.png", "meta": {"_type": "gradio.FileData"}}
  for inputs in ([file, "a, b", "{}", 0], [None, [file], "{}", 0]):
    with pytest.raises(gradio.Error, match="not as an address"):
      asyncio.run(blocks.preprocess_data(function, inputs, None))
