from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from sklearn.metrics import balanced_accuracy_score

from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts
from diffdis_jax.evals import tasks as evals

NAMES = ("red fox", "grey cat", "brown dog", "black crow", "white swan", "green frog", "blue whale")
LABELS = [NAMES[i] for i in np.random.default_rng(3).integers(0, 7, 400) % 6]  # the last one has no image
TEMPLATES = ("a photo of a {}.", "art of the {c}", "itap of {}")
DATA = {"split": "test"}


def make(use, fakes, labels=LABELS, **settings):
  use(test=fakes.Source(labels))
  return evals.create("zero_shot", data=DATA, classnames=NAMES, templates=TEMPLATES, **settings)


def reference(inference, templates):
  """Compute the logits in float64, class by class, as CLIP_benchmark's zero_shot_classifier does."""
  classes = []
  for name in NAMES:
    texts = [template.replace("{c}", "{}").format(name) for template in templates]
    embedded = inference.embed_texts({}, Tokenizer(16)(texts)).astype(np.float64)
    mean = (embedded / np.linalg.norm(embedded, axis=1, keepdims=True)).mean(axis=0)
    classes.append(mean / np.linalg.norm(mean))
  images = np.stack([np.full((8, 8, 3), sorted(set(LABELS)).index(label), np.uint8) for label in LABELS])
  return inference.embed_images({}, images, seed=5).astype(np.float64) @ np.stack(classes).T


def measure(logits):
  target = np.array([NAMES.index(label) for label in LABELS])
  order = np.argsort(-logits, axis=1)
  right = order[:, 0] == target
  recalls = [right[target == k].mean() for k in range(len(NAMES)) if (target == k).any()]
  return {
    "acc1": right.mean(),
    "acc5": (order[:, :5] == target[:, None]).any(1).mean(),
    "mean_per_class_recall": np.mean(recalls),
    "lowest_class_recall": min(recalls),
  }


def test_accuracy_equals_its_definition(use, fakes):
  inference = fakes.Inference(LABELS, noise=0.7)
  metrics = make(use, fakes, seed=5).run(inference, {})
  ensemble, single = measure(reference(inference, TEMPLATES)), measure(reference(inference, TEMPLATES[:1]))
  expected = ensemble | {f"{name}_single_template": value for name, value in single.items()}
  assert metrics == pytest.approx(expected)
  assert 0.3 < metrics["acc1"] < metrics["acc5"] < 1 and metrics["acc1"] != metrics["acc1_single_template"]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracy_equals_that_of_clip_benchmarks_logits(use, fakes):
  """The accuracy of CLIP_benchmark's logits is computed here: its own function fails with a recent NumPy."""
  inference = fakes.Inference(LABELS, noise=0.7)
  metrics = make(use, fakes, seed=5).run(inference, {})

  class Model:
    def encode_image(self, images):
      return torch.from_numpy(inference.embed_images({}, images.numpy(), seed=5))

    def encode_text(self, tokens):
      return torch.from_numpy(inference.embed_texts({}, tokens.numpy()))

  images = torch.from_numpy(np.stack([record["image"] for record in fakes.Source(LABELS).records]))
  target = torch.tensor([NAMES.index(label) for label in LABELS])
  tokenize = lambda texts: torch.from_numpy(Tokenizer(16)(texts))
  for suffix, templates in (("", TEMPLATES), ("_single_template", TEMPLATES[:1])):
    theirs = [template.replace("{}", "{c}") for template in templates]
    classifier = zeroshot_classification.zero_shot_classifier(Model(), tokenize, NAMES, theirs, "cpu", amp=False)
    logits, _ = zeroshot_classification.run_classification(Model(), classifier, [(images, target)], "cpu", amp=False)
    expected = {f"acc{k}": (logits.topk(k).indices == target[:, None]).any(dim=1).float().mean().item() for k in (1, 5)}
    expected["mean_per_class_recall"] = balanced_accuracy_score(target, logits.argmax(dim=1))
    assert {name: metrics[name + suffix] for name in expected} == pytest.approx(expected)


def leaks(evaluation, inference):
  """Return whether the accuracy with shuffled labels is so high that chance reaches it once in a thousand runs."""
  shares = np.unique(LABELS, return_counts=True)[1] / len(LABELS)
  chance = float((shares**2).sum())
  bound = chance + 3.1 * (chance * (1 - chance) / len(LABELS)) ** 0.5
  metrics = evaluation.run(inference, {})
  assert metrics["mean_per_class_recall"] > 0.05
  return metrics["acc1"] > bound


def test_the_leak_test_passes_an_honest_model_and_finds_a_cheat(use, fakes):
  honest = fakes.Inference(LABELS)
  assert make(use, fakes).run(honest, {})["acc1"] == 1
  assert not leaks(make(use, fakes, shuffle_labels=True), honest)
  assert leaks(make(use, fakes, shuffle_labels=True), fakes.Cheat(LABELS, LABELS))


def test_seen_and_unseen_classes_have_their_own_accuracy(use, fakes):
  inference = fakes.Inference(LABELS, noise=0.7)
  seen = NAMES[:4]
  use(test=fakes.Source(LABELS), train=fakes.Source([*seen, *seen]))
  settings = {"data": DATA, "classnames": NAMES, "seed": 5, "templates": TEMPLATES}
  metrics = evals.create("zero_shot", seen_split="train", **settings).run(inference, {})
  right = reference(inference, TEMPLATES).argmax(1) == [NAMES.index(label) for label in LABELS]
  is_seen = np.isin(LABELS, seen)
  assert metrics["acc1_seen"] == pytest.approx(right[is_seen].mean())
  assert metrics["acc1_unseen"] == pytest.approx(right[~is_seen].mean())
  use(test=fakes.Source(LABELS), train=fakes.Source([*NAMES]))
  all_seen = evals.create("zero_shot", seen_split="train", **settings).run(inference, {})
  assert all_seen["acc1_seen"] == metrics["acc1"] and "acc1_unseen" not in all_seen


ANIMALS = ("Black_crow", "brown dog", "red_fox")


@pytest.fixture
def folder(use, fakes):
  """Make records as prepare_data does for class folders: each has a number and the folder's name."""

  def make(number, classes, names=None):
    use(
      test=fakes.Source(
        list(names or [prompts.comparable(name) for name in classes]), number=number, **{"class": classes}
      )
    )

  return make


def create(names, **settings):
  return evals.create("zero_shot", data=DATA, classnames=names, **{"label_field": "number", **settings})


def test_numbers_are_checked_against_the_names_of_the_data(folder, fakes):
  folder([0, 1, 2, 0], [*ANIMALS, ANIMALS[0]])
  evaluation = create(("black crow", "Brown dog", "red fox", "green frog"))  # underscores and case do not count
  np.testing.assert_array_equal(evaluation.labels, [0, 1, 2, 0])
  for names, message in (
    (
      ("brown dog", "black crow", "red fox"),
      "^class 0 is 'Black_crow' in the data, but 'brown dog' in the class list; ",
    ),
    (
      ("black crow", "brown dog", "fox"),
      "^class 2 is 'red_fox' in the data, but 'fox' in the class list; give .*order",
    ),
  ):
    with pytest.raises(UserError, match=message) as error:
      create(names)
    assert "\n" not in str(error.value) and " label_field=class " in str(error.value)
  with pytest.raises(UserError, match="numbers such as 0; give the class names .*, or label_field=class"):
    create("")


def test_a_list_names_wordnets_folders_in_order(folder, fakes):
  """configs/diffdis_cc3m.py and the page on evaluation name ImageNet's classes like this."""
  codes = ("n01440764", "n01443537", "n01484850")
  folder([0, 1, 2, 1], [*codes, codes[1]], ["tench", "goldfish", "shark", "goldfish"])
  evaluation = create(("tench", "goldfish", "shark"))
  np.testing.assert_array_equal(evaluation.labels, [0, 1, 2, 1])
  assert evaluation.run(fakes.Inference(["tench", "goldfish", "shark"]), {})["acc1"] == 1
  # A list of another length, or folders that are numbered in another order, leave the names ambiguous.
  for number, names in (([0, 1, 2, 1], ("tench", "goldfish", "shark", "crane")), ([0, 2, 1, 2], ("tench", "x", "y"))):
    folder(number, [*codes, codes[1]], ["tench", "goldfish", "shark", "goldfish"])
    with pytest.raises(UserError, match="^class 0 is 'n01440764' in the data, but 'tench' in the class list; .*object"):
      create(names)


def test_an_object_names_the_classes_of_the_data(folder, use, fakes, tmp_path):
  """ImageNet's folders are named by codes. The object's order does not matter."""
  folder([0, 1, 2, 1], ["n01", "n02", "n03", "n02"], ["crane", "dog", "fox", "dog"])
  file = tmp_path / "names.json"
  file.write_text('{"n03": "fox", "n02": "dog", "n04": "cat", "n01": "crane"}')
  for field in ("number", "class"):
    evaluation = create(str(file), label_field=field)
    assert [evaluation.names[i] for i in evaluation.labels] == ["crane", "dog", "fox", "dog"]
    assert evaluation.run(fakes.Inference(["crane", "dog", "fox"]), {})["acc1"] == 1
  by_folder = {name: name for name in ("n02", "n03", "n01")}
  assert [create(by_folder).names[i] for i in create(by_folder).labels] == ["n01", "n02", "n03", "n02"]
  with pytest.raises(UserError, match="1 labels of the data are not in the class list: 'n02'"):
    create({"n01": "crane", "n03": "fox"})
  use(test=fakes.Source(["crane"], number=[0]))
  with pytest.raises(UserError, match="numbers without a name .*field 'class'.*; give a list"):
    create(str(file))


def test_a_damaged_record_is_named_in_one_line(use, fakes):
  source = fakes.Source(["cat", "dog"])
  source.records[1]["image"] = b"no image"
  use(test=source)
  for task in ("zero_shot", "retrieval"):
    with pytest.raises(UserError, match="record 1 of the data set cannot be used: corrupt image; download"):
      evals.create(task, data=DATA).run(fakes.Inference(["cat", "dog"]), {})


def test_wrong_class_lists_are_refused(use, fakes):
  use(test=fakes.Source(LABELS))
  with pytest.raises(UserError, match="duplicates: 'red fox'"):
    evals.create("zero_shot", data=DATA, classnames=(*NAMES, "red fox"))
  with pytest.raises(UserError, match="2 labels of the data are not in the class list: 'green frog', 'white swan'"):
    evals.create("zero_shot", data=DATA, classnames=NAMES[:4])
