"""Compare `diffdis_jax.load` with `inference`, for every type that holds an image."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

import diffdis_jax
from diffdis_jax import export_weights, inference
from diffdis_jax.common import one_file
from diffdis_jax.data import transforms
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts
from diffdis_jax.interop import packed as packing
from tests.untrained import run as run

NAMES = ["red star", "blue ring", "green dot"]


@pytest.fixture(scope="module")
def model(run):
  return diffdis_jax.load(run)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
  rng = np.random.default_rng(0)
  return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((32, 32), (40, 70), (90, 33))]


def test_generate_equals_inference(model, run):
  expected, params = inference.load(run, batch_size=2, generation_steps=3)
  tokens = Tokenizer(expected.max_length)(NAMES[:2])
  images = expected.generate(params, tokens, expected.noise(2, seed=5))
  for image, drawn in zip(images, model.generate(NAMES[:2], seed=5, steps=3), strict=True):
    np.testing.assert_array_equal(image, np.asarray(drawn))
  (alone,) = model.generate(NAMES[0], seed=5, steps=3)
  assert np.abs(np.asarray(alone, int) - images[0]).max() <= 1


def test_classify_and_rank_equal_a_softmax_and_cosines(model, run, pictures):
  expected, params = inference.load(run, batch_size=4)
  squares = np.stack([np.asarray(transforms.resize(image, 32)) for image in pictures])
  queries = expected.embed_images(params, squares, seed=0)
  texts = [[template.replace("{}", name) for template in prompts.TEMPLATES] for name in NAMES]
  tokenize = Tokenizer(expected.max_length)
  classes = np.stack([expected.embed_texts(params, tokenize(of_name)).mean(axis=0) for of_name in texts])
  classes /= np.linalg.norm(classes, axis=1, keepdims=True)
  logits = min(np.exp(float(params["logit_scale"])), 100) * queries @ classes.T
  shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  labels, scores = model.classify(pictures, NAMES, prompts.TEMPLATES)
  np.testing.assert_allclose(scores, shares, atol=1e-5)
  assert labels == [NAMES[i] for i in shares.argmax(axis=1)]
  cosines = queries @ expected.embed_texts(params, tokenize(["a red star"]))[0]
  order, scores = model.rank(pictures, "a red star")
  assert order == np.argsort(-cosines).tolist()
  np.testing.assert_allclose(scores, sorted(cosines, reverse=True), atol=1e-5)


@pytest.mark.slow
def test_the_templates_are_the_runs_own(tmp_path, run, model, pictures):
  """The run of these tests has no templates, so that CLIP's are taken."""
  assert (
    model.classify(pictures, NAMES).scores.tolist()
    == model.classify(pictures, NAMES, prompts.TEMPLATES).scores.tolist()
  )
  packed = tmp_path / "own.safetensors"
  export_weights.write_one_file(run, str(packed))
  record = one_file.read_record(packed)
  own = {**record.config, "evals": {"few": {**record.config["evals"]["few"], "templates": ["a {}"]}}}
  packing.write(packed, one_file.read_params(packed), dataclasses.replace(record, config=own), dtype=np.float32)
  other = diffdis_jax.load(packed)
  assert other.classify(pictures, NAMES).scores.tolist() == model.classify(pictures, NAMES, ["a {}"]).scores.tolist()
  own["evals"]["few"]["templates"] = "templates.json"  # the file may be on another machine
  packing.write(packed, one_file.read_params(packed), dataclasses.replace(record, config=own), dtype=np.float32)
  assert diffdis_jax.load(packed)._templates == prompts.TEMPLATES


def test_an_image_may_be_a_file_an_array_or_a_list(model, pictures, tmp_path):
  image, file = pictures[1], tmp_path / "image.png"
  image.save(file)
  expected = model.embed_images(image)
  for form in (file, str(file), np.asarray(image), np.asarray(image) / 255, np.asarray(image)[None], [image], (file,)):
    np.testing.assert_array_equal(model.embed_images(form), expected)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda model: model.classify("no.png", NAMES), "the image no.png cannot be used: .*No such file"),
    (lambda model: model.classify(np.zeros((8, 8)), NAMES), r"its shape is \(8,\)"),
    (lambda model: model.classify(np.zeros((8, 8, 3), np.int32), NAMES), "its numbers are int32; give uint8"),
    (lambda model: model.classify([], NAMES), "images is empty"),
    (lambda model: model.classify(np.zeros((8, 8, 3)), []), "names is empty; give at least one"),
    (lambda model: model.classify(np.zeros((8, 8, 3)), "red star"), "names is 'red star'; give a list"),
    (lambda model: model.classify(np.zeros((8, 8, 3)), NAMES, ["a photo"]), "has no place for the class name"),
    (lambda model: model.generate("red star", steps=0), "generation_steps"),
    (lambda model: diffdis_jax.load("emojis"), "emoji"),
  ],
)
def test_wrong_input_is_refused_in_one_line(model, call, message):
  with pytest.raises(UserError, match=message) as error:
    call(model)
  assert "\n" not in str(error.value)
