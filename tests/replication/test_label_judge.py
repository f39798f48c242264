"""The judge of labelled images with a generator of coloured discs."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx

from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks as evals
from replication import label_judge

pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "grey": (120, 120, 120)}


def paint(name: str, seed: int) -> np.ndarray:
  """A disc of the class's colour."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:16, :16]
  disc = (x - rng.uniform(6, 10)) ** 2 + (y - rng.uniform(6, 10)) ** 2 < rng.uniform(16, 36)
  return np.where(disc[..., None], COLOURS[name], 255).astype(np.uint8)


def records(*names: str, each: int) -> list[dict]:
  return [{"image": paint(name, seed), "label": name} for seed in range(each) for name in names]


class Painter:
  """A generator that paints what the prompt says, or what `instead` makes of it."""

  image_size = 16
  max_length = 8
  aligned = False
  generation_protocol = {"steps": 30, "guidance": 2.0}

  def __init__(self, **instead):
    self.instead, self.asked = instead, []

  def noise(self, n, seed):
    return np.full((n, 2, 2, 4), seed, np.float32)

  def generate(self, params, tokens, noise):
    assert len(tokens) == len(noise)
    texts = [*map(Tokenizer(self.max_length).decode, tokens)]
    self.asked = [next(name for name in COLOURS if name in text) for text in texts]
    return np.stack([paint(self.instead.get(name, name), 1000 + i) for i, name in enumerate(self.asked)])


@pytest.fixture(scope="module", autouse=True)
def compiled_well() -> Iterator[None]:
  """The judge's training takes longer than its compiling."""
  quick = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="module")
def evaluation(request):
  """Of the colours of `train`; a fourth one is in `other` alone, from which the judge learns too."""
  patch = pytest.MonkeyPatch()
  patch.setattr(sources, "open_source", lambda **section: SPLITS[section["split"]])
  request.addfinalizer(patch.undo)
  return evals.create(
    "generation_accuracy", data={"split": "train"}, splits=("other",), template="a {}", epochs=8, per_class=5
  )


SPLITS = {"train": records("red", "green", "blue", each=64), "other": records("red", "grey", each=32)}


def test_a_generator_of_what_was_asked_for_is_accurate(evaluation):
  painter = Painter()
  metrics = evaluation.run(painter, {})
  assert metrics["judge_acc1"] >= 0.95 and metrics["acc1"] >= 0.95
  assert metrics["judge_acc5"] == metrics["acc5"] == 1.0  # of four classes
  assert sorted(painter.asked) == ["blue"] * 5 + ["green"] * 5 + ["red"] * 5


def test_a_generator_of_something_else_is_not_accurate(evaluation):
  assert evaluation.run(Painter(red="green", green="blue", blue="grey"), {})["acc1"] <= 0.1
  one_wrong = evaluation.run(Painter(red="grey"), {})
  assert one_wrong["acc1"] == pytest.approx(2 / 3, abs=0.1)
  assert one_wrong["judge_acc1"] == evaluation.named_by.train().accuracy["judge_acc1"]  # trained once


class Critic(Painter):
  """One whose head knows a colour by the image's middle, and a prompt by its word."""

  aligned = True

  def embed_images(self, params, images, *, seed):
    colours = np.array([*COLOURS.values()])
    nearest = ((images[:, 8, 8][:, None].astype(int) - colours) ** 2).sum(-1).argmin(1)
    return np.eye(4, dtype=np.float32)[nearest]

  def embed_texts(self, params, tokens):
    texts = [*map(Tokenizer(self.max_length).decode, tokens)]
    return np.stack([np.float32([0.8 if name in text else 0.1 for name in COLOURS]) for text in texts])


def test_the_run_judges_its_own_images_too(evaluation):
  """Of three colours one is painted as another, which its head finds out, whatever the judge says."""
  metrics = evaluation.run(Critic(red="grey"), {})
  assert metrics["head_acc1"] == pytest.approx(2 / 3)
  assert metrics["head_similarity"] == pytest.approx((0.8 + 0.8 + 0.1) / 3)
  assert not [name for name in evaluation.run(Painter(), {}) if name.startswith("head")]


def test_classes_of_one_name_are_one_to_the_head(evaluation, monkeypatch):
  """Between the places of two equal names there is nothing to tell."""
  monkeypatch.setattr(evaluation, "classes", np.array([0, 1, 3, 4]))
  texts = ["a blue", "a green", "a grey", "a red", "a red"]
  images = np.stack([paint(name, 0) for name in ("blue", "green", "red", "red")])
  assert evaluation.judge_by_head(Critic(), {}, images, texts)["head_acc1"] == 1.0


def test_the_protocol_says_what_the_judge_saw(evaluation):
  protocol = evaluation.protocol(Painter())
  assert {"steps": 30, "num_images": 15, "num_classes": 4, "templates": ["a {}"]}.items() <= protocol.items()
  assert protocol["judge"] == {"splits": ["train", "other"], "epochs": 8, "trained_on": 230, "measured_on": 26}


def test_images_held_out_are_not_trained_on(evaluation, monkeypatch):
  seen = {}

  def train(images, labels, **settings):
    seen.update(images=[np.asarray(image).tobytes() for image in images], labels=labels)
    return label_judge.LabelClassifier(3, rngs=nnx.Rngs(0))

  def classify(model, images):
    seen.update(measured=len(images))
    return np.zeros((len(images), 3), np.float32)

  monkeypatch.setattr(label_judge, "train_on_labels", train)
  monkeypatch.setattr(label_judge, "classify", classify)
  evaluation = evals.create("generation_accuracy", data={"split": "train"}, held_out=0.25)
  assert evaluation.named_by.train().accuracy == {"judge_acc1": 0.0, "judge_acc5": 1.0}
  everything = [record["image"].tobytes() for record in SPLITS["train"]]
  assert len(seen["images"]) == 144 and seen["measured"] == 48
  assert len({*everything} - {*seen["images"]}) == 48
  own = {record["image"].tobytes(): record["label"] for record in SPLITS["train"]}
  assert [evaluation.named_by.classnames[k] for k in seen["labels"]] == [own[image] for image in seen["images"]]


def test_ties_and_nans_are_wrong():
  logits = np.array([[3.0, 1.0, 2.0], [3.0, 3.0, 1.0], [np.nan, 1.0, 2.0], [0.0, 1.0, 2.0]], np.float32)
  np.testing.assert_array_equal(label_judge.ranks(logits, np.array([0, 0, 0, 0])), [0, 1, 2, 2])
  np.testing.assert_array_equal(label_judge.ranks(logits[2:], np.array([2, 1])), [1, 1])


@pytest.mark.parametrize(
  ("splits", "settings", "message"),
  [
    (dict(train=records("red", each=9)), {}, "names red alone"),
    (dict(train=records("red", "blue", each=2)), {"held_out": 0.1}, "held_out=0.1 of 4 images is none"),
    (dict(train=records("red", "blue", each=2)), {"held_out": 0.9}, "held_out=0.9 of 4 images is all of them"),
    (dict(train=[{"image": paint("red", 0), "label": 3}] * 9), {}, "holds 3; a label should be a class's name"),
    (dict(train=records("red", "blue", each=9)), {"label_field": "kind"}, "no field 'kind'"),
    (dict(train=records("red", "blue", each=9)), {"epochs": 0}, "epochs"),
    (dict(train=records("red", "blue", each=9)), {"template": "an icon"}, "an icon"),
  ],
)
def test_wrong_settings_are_refused(splits, settings, message, monkeypatch):
  monkeypatch.setattr(sources, "open_source", lambda **section: splits[section["split"]])
  with pytest.raises(UserError, match=message):
    evals.create("generation_accuracy", data={"split": "train"}, **settings)
