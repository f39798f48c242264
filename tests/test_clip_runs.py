"""Test that a CLIP is trained and evaluated by the commands, exported to PyTorch, imported again and trained on."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from diffdis_jax import config as run_config
from diffdis_jax import evaluate, export_weights, generate, import_weights, inference
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks as sections
from diffdis_jax.models.clip import normalise
from diffdis_jax.run import checkpoint, restore, workdir
from diffdis_jax.structs import TrainState
from diffdis_jax.training import start
from tests import steps, tiny_clip
from tests.command_runs import call
from tests.models.from_torch import nchw
from tests.models.networks import random_params, relative_error
from tests.steps import build_trainer, config_of, network_of

pytest_plugins = ("tests.command_runs",)

PROMPTS = ["a red star", "a blue ring", "a very long caption of a green cross, cut before it ends"]
SHAPES = {"name": "shapes", "split": "test", "image_size": 16, "seed": 1, "num_images": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> str:
  path = str(tmp_path_factory.mktemp("clip") / "run")
  done = call("train", environment, "--config=tests/tiny_clip.py", f"--workdir={path}")
  assert done.returncode == 0, done.stderr
  assert "best test/acc1" in done.stderr
  return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: str) -> pathlib.Path:
  out = tmp_path_factory.mktemp("clip") / "out"
  export_weights.export_weights(run, str(out))
  return out


@pytest.fixture(scope="module")
def embedded(run: str) -> dict[str, np.ndarray]:
  """Return images and tokens, and their embeddings by the run."""
  model, params = inference.load(run, batch_size=8)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  tokens = Tokenizer(model.max_length)(PROMPTS)
  image, text = model.embed_images(params, images, seed=0), model.embed_texts(params, tokens)
  np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(model.embed_images(params, images, seed=1), image, atol=1e-6)
  pixels = np.asarray(normalise(jnp.asarray(images)))
  return {"pixels": pixels, "tokens": tokens, "image": image, "text": text}


def metrics_of(run: str) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_evaluates_and_keeps_its_best_checkpoint(run):
  lines = metrics_of(run)
  losses = [line for line in lines if "loss" in line]
  accuracy = {line["step"]: line["test/acc1"] for line in lines if "test/acc1" in line}
  assert [line["step"] for line in losses] == [4, 8] and list(accuracy) == [4, 8]
  assert {"loss_contrastive", "alignment_accuracy", "temperature", "grad_norm"} <= losses[-1].keys()
  assert workdir.latest_step(run) == 8
  best = checkpoint.best(run, run_config.load(run).checkpoint)
  assert best is not None and best.value == pytest.approx(max(accuracy.values()))


def test_evaluate_gives_the_figures_that_the_run_logged(run):
  section, *_ = sections.of_config(config_of(run).evals.to_dict(), tasks=None)
  retrieval = sections.Section("shapes", "retrieval", {"data": SHAPES, "duplicate_captions": True})
  results = evaluate.evaluate(run, [section, retrieval])
  record = results["zero_shot"][section.dataset]
  assert record["metrics"]["acc1"] == pytest.approx(metrics_of(run)[-1]["test/acc1"])
  assert not {"steps", "num_noise_samples", "guidance"} & record["protocol"].keys()
  assert record["protocol"]["checkpoint"] == 8
  assert 0 < results["retrieval"]["shapes"]["metrics"]["image_retrieval_recall@10"] <= 1


def test_sampling_from_a_clip_is_refused(run, tmp_path):
  for use, message in (
    (lambda: inference.load(run, num_noise_samples=2), "this run is a CLIP model, which samples nothing; num_noise_"),
    (lambda: generate.generate(run, ["a red star"], str(tmp_path / "out")), "this run is a CLIP model, which has no"),
  ):
    with pytest.raises(UserError, match=message) as error:
      use()
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_transformers_embeddings_equal_the_runs(exported, embedded):
  model = CLIPModel.from_pretrained(exported).eval()
  tokens = CLIPTokenizer.from_pretrained(exported)(PROMPTS, padding="max_length", truncation=True)["input_ids"]
  np.testing.assert_array_equal(tokens, embedded["tokens"])
  with torch.no_grad():
    theirs = model(input_ids=torch.tensor(tokens), pixel_values=nchw(embedded["pixels"]))
  assert relative_error(embedded["image"], theirs.image_embeds) < 1e-5
  assert relative_error(embedded["text"], theirs.text_embeds) < 1e-5


def test_open_clips_embeddings_equal_the_runs(exported, embedded):
  model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported}")
  model.eval()
  with torch.no_grad():
    image = model.encode_image(nchw(embedded["pixels"]), normalize=True)
    text = model.encode_text(torch.tensor(embedded["tokens"]).long(), normalize=True)
  assert relative_error(embedded["image"], image) < 1e-5 and relative_error(embedded["text"], text) < 1e-5
  assert preprocess.transforms[0].size == 16


@pytest.mark.parametrize("file", ["", "open_clip_model.safetensors"])
def test_an_export_is_imported_bit_for_bit_and_trained_on(run, exported, tmp_path, file):
  imported = str(tmp_path / "imported")
  import_weights.import_weights(str(exported / file), imported)
  before, after = restore.restore_params(run), restore.restore_params(imported)
  assert before.keys() == after.keys()
  for path, value in before.items():
    np.testing.assert_array_equal(after[path], value, err_msg=path)
  assert config_of(imported).model.to_dict() == config_of(run).model.to_dict()
  trainer = build_trainer(tiny_clip.get_config(), steps.make_mesh())
  for path, value in start.load_initial(imported, trainer).items():
    np.testing.assert_array_equal(value, before.pop(path), err_msg=path)
  assert not before


@pytest.mark.slow
def test_a_run_with_larger_images_and_shorter_texts_than_its_towers_is_exported(tmp_path):
  """The position embeddings of images are interpolated; those of text beyond the captions were never trained."""
  config = tiny_clip.get_config()
  config.image_size, config.model.text_encoder.max_length = 32, 12
  path, out, back = (str(tmp_path / name) for name in ("run", "out", "back"))
  workdir.open_for_training(path, config.to_dict())
  with checkpoint.Checkpointer(path) as checkpointer:
    checkpointer.save(1, TrainState(params=random_params(network_of(config).shapes, 0)))
  model, params = inference.load(path, batch_size=8)
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  expected = model.embed_images(params, images, seed=0)
  texts = model.embed_texts(params, Tokenizer(model.max_length)(PROMPTS))  # one prompt is too long and cut

  export_weights.export_weights(path, out)
  pixels = nchw(np.asarray(normalise(jnp.asarray(images))))
  theirs = CLIPModel.from_pretrained(out).eval()
  other, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
  with torch.no_grad():
    image = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
    assert relative_error(expected, image / image.norm(dim=-1, keepdim=True)) < 1e-5
    assert relative_error(expected, other.eval().encode_image(pixels, normalize=True)) < 1e-5
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(PROMPTS)
    assert relative_error(texts, other.encode_text(tokens, normalize=True)) < 1e-5
  assert preprocess.transforms[0].size == 32
  export_weights.export_weights(path, out + "16", dtype="bfloat16")
  other = open_clip.create_model(f"local-dir:{out}16")
  assert other.logit_scale == float(params["logit_scale"]) and other.positional_embedding.dtype == torch.float32
  assert {x.dtype for x in CLIPModel.from_pretrained(out + "16").parameters()} == {torch.bfloat16}
  import_weights.import_weights(out, back)
  assert (config_of(back).image_size, config_of(back).data.max_length) == (32, 8)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model.vision_encoder.activation": "quick_gelu"}, "text_encoder.activation is 'gelu'; .* only with 'quick_gelu'"),
    ({"model.text_encoder.eos_id": 5}, "eos_id is 5; .* only with 49407"),
  ],
)
def test_a_clip_that_neither_library_can_represent_is_refused(run, tmp_path, changes, message):
  config = config_of(run)
  config.update_from_flattened_dict(changes)
  workdir.open_for_training(str(tmp_path / "run"), config.to_dict())
  with pytest.raises(UserError, match=message):
    export_weights.export_weights(str(tmp_path / "run"), str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()
