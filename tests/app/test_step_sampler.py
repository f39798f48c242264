"""Compare step-by-step sampling with the whole loops, which tests/test_inference.py compares with DDIM by hand."""

from __future__ import annotations

import numpy as np
import pytest

from diffdis_jax.app import step_sampler as module
from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from tests import steps, tiny, tiny_clip
from tests.models.networks import random_params

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def make(config, **sampling) -> StepSampler:
  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=2, **sampling)
  return StepSampler(inference, random_params(inference.shapes, seed=0), seconds=300)


@pytest.fixture(scope="module")
def sampler():
  sampler = make(tiny.get_config(), generation_steps=3, generation_guidance=2.0, steps=2, num_noise_samples=3)
  yield sampler
  sampler.closed.set()


def test_the_last_frame_is_the_image_that_generate_gives(sampler):
  model = sampler.model
  *_, last = sampler.generate("a red star", seed=4, steps=3, guidance_scale=2.0, frames=20)
  expected = model.generate(sampler._params, Tokenizer(model.max_length)(["a red star"]), model.noise(1, 4))[0]
  assert np.abs(last.image.astype(int) - expected.astype(int)).max() <= 1
  assert expected.std() > 1


def test_frames_are_spread_evenly_and_end_with_the_last_step(sampler):
  how = dict(seed=0, guidance_scale=2.0)
  for num_steps, frames, expected in ((3, 20, [1, 2, 3]), (7, 3, [1, 4, 7]), (6, 1, [6])):
    assert [frame.step for frame in sampler.generate("a", steps=num_steps, frames=frames, **how)] == expected


def test_each_image_has_its_own_noise_and_the_scale_counts(sampler):
  last = lambda prompt, scale, place: [
    *sampler.generate(prompt, seed=4, steps=3, guidance_scale=scale, frames=1, place=place)
  ][-1].image.astype(int)
  model = sampler.model
  tokens = Tokenizer(model.max_length)(["a star", "a star"])
  second = model.generate(sampler._params, tokens, model.noise(2, 4))[1]
  assert np.abs(last("a star", 2.0, 1) - second).max() <= 1
  assert np.abs(last("a star", 2.0, 0) - second).max() > 1
  assert np.abs(last("a star", 3.0, 0) - last("a ring", 3.0, 0)).max() > 1
  assert np.abs(last("a star", 0.0, 0) - last("", 3.0, 0)).max() <= 1, "without guidance, or by the empty prompt"


def test_nothing_is_compiled_again_for_other_requests(sampler):
  programs = (sampler._conditions, sampler._generation_step, sampler._preview)
  for seed, prompt, steps_, scale in ((0, "a", 1, 2.0), (9, "a longer prompt of words", 5, 1.0)):
    [*sampler.generate(prompt, seed=seed, steps=steps_, guidance_scale=scale, frames=2)]
    sampler.text_queries(prompt.split())
    sampler.embed_images(IMAGE[None], seed=seed)
  programs += (sampler.model.programs["text embeddings"], sampler.model.programs["image queries"])
  assert [len(program._compiled) for program in programs] == [1] * 5


def test_a_model_that_diverged_is_a_message(sampler, monkeypatch):
  monkeypatch.setattr(sampler, "_params", {name: x * np.float32(np.nan) for name, x in sampler._params.items()})
  for ask in (
    lambda: list(sampler.generate("a", seed=0, steps=2, guidance_scale=2.0, frames=1)),
    lambda: sampler.text_queries(["a"]),
    lambda: sampler.embed_images(IMAGE[None], seed=0),
  ):
    with pytest.raises(UserError, match="gives numbers that are not finite.*; take an earlier checkpoint, --step"):
      ask()


def test_a_step_takes_the_runs_form_of_attention():
  """An attention kernel that runs only on another platform is refused when it is traced."""
  config = tiny.get_config()
  config.model.attention_kernel = "pallas"
  sampler = make(config)
  with pytest.raises(UserError, match="attention_kernel is 'pallas', which runs on tpu alone, not on cpu"):
    list(sampler.generate("a", seed=0, steps=1, guidance_scale=2.0, frames=1))
  sampler.closed.set()


def test_the_temperature_is_the_loss_temperature_and_requests_end_with_the_page():
  sampler = make(tiny_clip.get_config())
  scale = float(sampler._params["logit_scale"])
  assert sampler.temperature == pytest.approx(min(np.exp(scale), 100), rel=1e-6)
  sampler.closed.set()
  with pytest.raises(UserError, match="the page has ended"):
    sampler.text_queries(["a"])


@pytest.mark.parametrize(
  "objectives, expected",
  [
    (("generation", "discrimination"), ("draw", "classify", "search")),
    (("generation",), ("draw",)),
    (("discrimination",), ("classify", "search")),
    (("contrastive",), ("classify", "search")),
  ],
)
def test_a_run_has_the_tabs_that_it_can_serve(objectives, expected):
  assert module.tabs(objectives) == expected
  with pytest.raises(UserError, match="objectives are reconstruction"):
    module.tabs(("reconstruction",))


def test_an_import_whose_head_was_never_trained_only_generates(sampler, monkeypatch):
  assert sampler.tabs == ("draw", "classify", "search")
  monkeypatch.setattr(sampler.model, "aligned", False)
  assert StepSampler(sampler.model, sampler._params, seconds=300).tabs == ("draw",)
