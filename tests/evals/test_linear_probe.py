"""Compare logistic regression with scikit-learn's, and the features of the UNet's middle block with diffusers'."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from sklearn.linear_model import LogisticRegression
from transformers import CLIPTextModel

from diffdis_jax import inference
from diffdis_jax.data import sources
from diffdis_jax.data.layouts import labelled
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, linear_probe
from diffdis_jax.evals import tasks as evals
from diffdis_jax.evals.linear_probe import Examples
from tests.models.from_torch import nchw

pytest_plugins = ("tests.pipelines",)

CLASSES = ("a", "b", "c", "d")


def examples(seed: int, n: int, width: int = 6) -> Examples:
  """Draw examples of overlapping classes of different sizes."""
  rng = np.random.default_rng(seed)
  labels = rng.choice(4, n, p=(0.4, 0.3, 0.2, 0.1))
  means = np.random.default_rng(9).normal(size=(4, width))
  return Examples((means[labels] + rng.normal(size=(n, width))).astype(np.float32), labels)


def theirs(train: Examples, l2: float) -> LogisticRegression:
  """Fit scikit-learn's model. It sums the losses of the examples, so that C = 1 / (n l2)."""
  model = LogisticRegression(C=1 / (len(train.labels) * l2), tol=1e-8, max_iter=5000)
  return model.fit(train.x.astype(np.float64), train.labels)


def objective(weight: np.ndarray, bias: np.ndarray, these: Examples, l2: float) -> float:
  logits = these.x.astype(np.float64) @ weight + bias
  own = logits[np.arange(len(logits)), these.labels]
  return float((np.log(np.exp(logits).sum(axis=1)) - own).mean() + l2 / 2 * (weight.astype(np.float64) ** 2).sum())


# For a small l2 the minimum is flat, and float32 gives its position less exactly than its value.
@pytest.mark.parametrize(("l2", "tolerance"), [(1.0, 2e-3), (1e-2, 2e-3), (1e-4, 1e-2)])
def test_the_fit_is_the_minimum_that_scikit_learn_finds(l2, tolerance):
  train, test = examples(0, 120), examples(1, 80)
  ours, expected = linear_probe.fit(train, num_classes=4, l2=l2), theirs(train, l2)
  smallest = objective(expected.coef_.T, expected.intercept_, train, l2)
  assert objective(ours.weight, ours.bias, train, l2) == pytest.approx(smallest, rel=1e-5)
  largest = np.abs(expected.coef_).max()
  np.testing.assert_allclose(ours.weight, expected.coef_.T, atol=tolerance * largest)
  centred = ours.bias - ours.bias.mean()  # a constant that is added to every bias changes nothing
  np.testing.assert_allclose(centred, expected.intercept_ - expected.intercept_.mean(), atol=tolerance * largest)
  assert ours.accuracy(test) == pytest.approx(expected.score(test.x, test.labels))
  warm = linear_probe.fit(train, num_classes=4, l2=l2, start=linear_probe.fit(train, num_classes=4, l2=10 * l2))
  np.testing.assert_allclose(warm.weight, ours.weight, atol=tolerance * largest)


def test_a_tie_is_wrong():
  zeros = linear_probe.Linear(np.zeros((6, 4), np.float32), np.zeros(4, np.float32))
  assert zeros.accuracy(examples(0, 50)) == 0.0


def test_shots_are_per_class_and_more_shots_include_the_fewer():
  labels = np.array([0] * 9 + [1] * 3 + [2])
  few, more = (base.first_of_each(labels, count, seed=3) for count in (2, 4))
  np.testing.assert_array_equal(np.bincount(labels[few]), [2, 2, 1])
  np.testing.assert_array_equal(np.bincount(labels[more]), [4, 3, 1])
  assert {*few} < {*more} and {*few} != {*base.first_of_each(labels, 2, seed=4)}


class Embedding:
  """Stand in for a CLIP: the embedding of an image is its pixels."""

  image_size, aligned, protocol = 4, True, {}
  network = types.SimpleNamespace(is_clip=True)

  def embed_images(self, params, images, *, seed):
    return images[np.arange(len(images))].reshape(len(images), -1).astype(np.float32) / 255


def as_records(these: Examples) -> list[dict]:
  """Return images of 16 pixels, the first two of which hold the six numbers of an example."""
  pixels = np.zeros((len(these.x), 16, 3), np.uint8)
  pixels[:, :2] = (these.x * 12 + 128).clip(0, 255).reshape(-1, 2, 3)
  return [{"image": x.reshape(4, 4, 3), "label": CLASSES[k]} for x, k in zip(pixels, these.labels, strict=True)]


@pytest.fixture
def splits(monkeypatch):
  by_split = {name: as_records(examples(i, n)) for i, (name, n) in enumerate(dict(train=150, test=80).items())}
  by_split["test"].append({**by_split["test"][0], "label": "of another kind"})  # training has no such class
  monkeypatch.setattr(sources, "open_source", lambda *, split: by_split[split])
  return by_split


def test_the_evaluation_equals_one_with_scikit_learn(splits):
  """Of the values of l2 that are best on val, the largest is taken, and its accuracy on test is reported."""
  evaluation = evals.create("linear_probe", data={"split": "test"}, shots=("8", "all"), seed=2)
  metrics = evaluation.run(Embedding(), {})
  data = {}
  for name, part in evaluation.examples.items():
    chosen_records = [splits["test" if name == "test" else "train"][i] for i in part.x]
    x = np.stack([record["image"].ravel() for record in chosen_records]).astype(np.float32) / 255
    data[name] = Examples(x, np.array([CLASSES.index(record["label"]) for record in chosen_records]))
  assert len(data["test"].labels) == 80
  for suffix, rows in (("8_shots", base.first_of_each(data["train"].labels, 8, seed=2)), ("all", slice(None))):
    train = Examples(data["train"].x[rows], data["train"].labels[rows])
    mean, spread = train.x.mean(0), train.x.std()
    models = {l2: theirs(Examples((train.x - mean) / spread, train.labels), l2) for l2 in linear_probe.L2}
    score = lambda l2, name, m=models, a=mean, s=spread: m[l2].score((data[name].x - a) / s, data[name].labels)
    best = max(score(l2, "val") for l2 in models)
    chosen = max(l2 for l2 in models if score(l2, "val") == best)
    assert metrics[f"l2_embedding_{suffix}"] == chosen
    assert metrics[f"acc1_embedding_{suffix}"] == pytest.approx(score(chosen, "test"), abs=1 / 80 + 1e-9)
  assert not [name for name in metrics if "middle" in name]
  expected = {"num_train_images": 120, "num_val_images": 30, "num_test_images": 80, "num_classes": 4}
  assert expected.items() <= evaluation.protocol(Embedding()).items()


def test_no_class_is_held_out_entirely(splits):
  """A random split could put all the images of a class that has one or two into val."""
  records = [{**splits["train"][0], "label": label} for label in [*"a" * 30, *"b" * 2, "c", "d", "e", "f"]]
  splits["train"][:] = records
  for seed in range(6):
    evaluation = evals.create("linear_probe", data={"split": "test"}, seed=seed)
    rows = {name: evaluation.examples[name].x.tolist() for name in ("train", "val")}
    assert sorted(rows["train"] + rows["val"]) == list(range(len(records))) and len(rows["val"]) > 1
    assert {records[i]["label"] for i in rows["train"]} == {*"abcdef"}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(data={"split": "train"}), "would test on the split train, on which it trains"),
    (dict(shots=("0",)), "shots has '0'; it should be numbers from 1 on, or all"),
    (dict(label_field="kind"), "no field 'kind'"),
  ],
)
def test_wrong_settings_are_refused(splits, settings, message):
  with pytest.raises(UserError, match=message):
    evals.create("linear_probe", **{"data": {"split": "test"}, **settings})


@pytest.mark.parametrize(
  ("task", "settings"),
  [
    ("linear_probe", {}),
    ("zero_shot", {"classnames": CLASSES, "seen_split": "train"}),
  ],
)
def test_a_published_set_of_one_split_is_refused(monkeypatch, task, settings):
  """A published set is opened as its one split, whatever split is named: the probe would train on the test images."""
  origin = labelled.Origin("wds", "/data/cifar10", "test")
  images = [b"an image"] * 40  # the splits are checked before any image is decoded
  published = labelled.Labelled(images, np.arange(40) % 4, CLASSES, origin=origin)
  monkeypatch.setattr(sources, "open_source", lambda **data: published)
  data = {"name": "cifar10", "path": "/data", "split": "test", "image_size": 32}
  with pytest.raises(UserError, match="/data/cifar10 is the split test alone, and has no split train; prepare both"):
    evals.create(task, data=data, **{"label_field": "class", **settings})


@pytest.mark.slow
def test_the_features_of_the_middle_block_equal_diffusers(sd, imported, monkeypatch):
  """An imported model has no trained head, so its features come from the UNet alone, at timestep 0."""
  ours, params = inference.load(imported, batch_size=4)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
  unet, vae = UNet2DConditionModel.from_pretrained(sd / "unet"), AutoencoderKL.from_pretrained(sd / "vae")
  text, seen = CLIPTextModel.from_pretrained(sd / "text_encoder"), []
  unet.mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
  with torch.no_grad():
    z = vae.encode(nchw(images.astype(np.float32) / 127.5 - 1)).latent_dist.mean * vae.config.scaling_factor
    states = text(torch.from_numpy(Tokenizer(ours.max_length)([""])).long()).last_hidden_state
    unet(z, torch.zeros(3, dtype=torch.long), encoder_hidden_states=states.expand(3, -1, -1))
  records = [{"image": image, "label": "ab"[i % 2]} for i, image in enumerate(images)]
  monkeypatch.setattr(sources, "open_source", lambda *, split: records)
  evaluation = evals.create("linear_probe", data={"split": "test"}, shots=("all",))
  kept = []

  def keep(features, shots):
    kept.append(features["test"].x)
    return {"acc1": 0.0}

  monkeypatch.setattr(evaluation, "_measure", keep)
  assert [*evaluation.run(ours, params)] == ["acc1_middle_all"]
  np.testing.assert_allclose(kept[0], seen[0].mean((2, 3)).numpy(), rtol=1e-4, atol=1e-4)
  assert evaluation.protocol(ours)["timestep"] == 0
