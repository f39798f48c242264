from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from sklearn.metrics import balanced_accuracy_score

from diffdis_jax.data import records
from diffdis_jax.data.prepare import own
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts
from diffdis_jax.evals import tasks as evals
from tests.raw_pairs import picture

NAMES = ("red fox", "grey cat", "brown dog", "black crow", "white swan", "green frog", "blue whale")
LABELS = [NAMES[i] for i in np.random.default_rng(3).integers(0, 7, 400) % 6]  # the last one has no image
TEMPLATES = ("a photo of a {}.", "art of the {c}", "itap of {}")
DATA = {"split": "test"}


def make(use, fakes, labels=LABELS, **settings):
  use(test=fakes.Source(labels))
  return evals.create("zero_shot", data=DATA, classnames=NAMES, templates=TEMPLATES, **settings)


def reference(inference, templates):
  """Logits in float64, each class by itself, as CLIP_benchmark's zero_shot_classifier says."""
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
  first = np.argsort(-logits, axis=1)
  right = first[:, 0] == target
  recalls = [right[target == k].mean() for k in range(len(NAMES)) if (target == k).any()]
  return {
    "acc1": right.mean(),
    "acc5": (first[:, :5] == target[:, None]).any(1).mean(),
    "mean_per_class_recall": np.mean(recalls),
    "lowest_class_recall": min(recalls),
  }


def test_accuracy_by_definition(use, fakes):
  inference = fakes.Inference(LABELS, noise=0.7)
  metrics = make(use, fakes, seed=5).run(inference, {})
  ensemble, single = measure(reference(inference, TEMPLATES)), measure(reference(inference, TEMPLATES[:1]))
  expected = ensemble | {f"{name}_single_template": value for name, value in single.items()}
  assert metrics == pytest.approx(expected)
  assert 0.3 < metrics["acc1"] < metrics["acc5"] < 1 and metrics["acc1"] != metrics["acc1_single_template"]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracy_as_clip_benchmark_computes_it(use, fakes):
  """From its logits, since its own count of the right ones does not run with a recent NumPy."""
  inference = fakes.Inference(LABELS, noise=0.7)
  metrics = make(use, fakes, seed=5).run(inference, {})

  class Model:
    def encode_image(self, images):
      return torch.from_numpy(inference.embed_images({}, images.numpy(), seed=5))

    def encode_text(self, tokens):
      return torch.from_numpy(inference.embed_texts({}, tokens.numpy()))

  shown = torch.from_numpy(np.stack([record["image"] for record in fakes.Source(LABELS).records]))
  target = torch.tensor([NAMES.index(label) for label in LABELS])
  tokenize = lambda texts: torch.from_numpy(Tokenizer(16)(texts))
  for suffix, templates in (("", TEMPLATES), ("_single_template", TEMPLATES[:1])):
    theirs = [template.replace("{}", "{c}") for template in templates]
    classifier = zeroshot_classification.zero_shot_classifier(Model(), tokenize, NAMES, theirs, "cpu", amp=False)
    logits, _ = zeroshot_classification.run_classification(Model(), classifier, [(shown, target)], "cpu", amp=False)
    expected = {f"acc{k}": (logits.topk(k).indices == target[:, None]).any(dim=1).float().mean().item() for k in (1, 5)}
    expected["mean_per_class_recall"] = balanced_accuracy_score(target, logits.argmax(dim=1))
    assert {name: metrics[name + suffix] for name in expected} == pytest.approx(expected)


def test_numbers_of_wordnet_are_no_class_names(use, fakes):
  use(test=fakes.Source(["n01440764", "n01443537"] * 4))
  with pytest.raises(UserError, match="class names are numbers such as n01440764; give a JSON list of names"):
    evals.create("zero_shot", data=DATA)


def leaks(evaluation, inference):
  """Whether accuracy with shuffled images is above what chance gives in all but one of a thousand runs."""
  shares = np.unique(LABELS, return_counts=True)[1] / len(LABELS)
  chance = float((shares**2).sum())
  bound = chance + 3.1 * (chance * (1 - chance) / len(LABELS)) ** 0.5
  metrics = evaluation.run(inference, {})
  assert metrics["mean_per_class_recall"] > 0.05
  return metrics["acc1"] > bound


def test_a_class_whose_prompt_is_too_long_is_named_once(use, fakes, caplog):
  """A run in training measures by the same prompts again and again."""
  use(test=fakes.Source(["a b"]))
  long = "a b " * 8 + "c"  # of 17 tokens, where 14 are read
  ours = evals.create("zero_shot", data=DATA, classnames=("a b", long), templates=("{}",))
  for _ in range(2):
    ours.run(fakes.Inference(["a b"]), {})
  said = [message for message in caplog.messages if "tokens" in message]
  assert said == [f"this run reads 14 tokens: of {long!r} it sees {' '.join(['a b'] * 7)!r}"]


def test_leak_test_passes_an_honest_model_and_catches_a_cheat(use, fakes):
  honest = fakes.Inference(LABELS)
  assert make(use, fakes).run(honest, {})["acc1"] == 1
  assert not leaks(make(use, fakes, shuffle_labels=True), honest)
  assert leaks(make(use, fakes, shuffle_labels=True), fakes.Cheat(LABELS, LABELS))


def test_seen_and_unseen_apart(use, fakes):
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


def test_class_list(use, fakes):
  use(test=fakes.Source(LABELS))
  present = tuple(sorted(set(LABELS)))
  assert evals.create("zero_shot", data=DATA).names == present
  assert evals.create("zero_shot", data=DATA, num_images=2).names == present
  assert make(use, fakes).names == NAMES


def test_numbers_count_into_the_class_names(use, fakes):
  use(test=fakes.Source(["cat", "dog", "cat"], number=[0, 1, 0], wrong=[0, 1, 2], other=[0.5, 1, 0]))
  numbered = evals.create("zero_shot", data=DATA, label_field="number", classnames=("cat", "dog"))
  np.testing.assert_array_equal(numbered.labels, [0, 1, 0])
  for field, names, message in (
    ("wrong", ("cat", "dog"), "'wrong' holds 2, but there are 2 class names"),
    ("number", "", "numbers such as 0; give the class names"),
    ("other", ("cat", "dog"), "holds 0.5; a label should be"),
    ("absent", "", "no field 'absent'; they have caption, image, label, number"),
  ):
    with pytest.raises(UserError, match=message):
      evals.create("zero_shot", data=DATA, label_field=field, classnames=names)


def test_numbered_classes_may_share_a_name_and_then_are_a_tie(use, fakes):
  names = ("cat", "crane", "dog", "crane", "fox")
  use(test=fakes.Source(["cat", "crane", "dog", "fox"], number=[0, 3, 2, 4]))
  evaluation = evals.create("zero_shot", data=DATA, label_field="number", classnames=names)
  np.testing.assert_array_equal(evaluation.labels, [0, 3, 2, 4])
  metrics = evaluation.run(fakes.Inference(names), {})
  assert (metrics["acc1"], metrics["acc5"], metrics["mean_per_class_recall"]) == (0.75, 1.0, 0.75)


ANIMALS = ("Black_crow", "brown dog", "red_fox")


@pytest.fixture
def folder(use, fakes):
  """Records as prepare_data makes them of class folders: a number, and the folder's name."""

  def make(number, classes, names=None):
    use(
      test=fakes.Source(
        list(names or [prompts.comparable(each) for each in classes]), number=number, **{"class": classes}
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


def test_folders_named_by_numbers(folder):
  """Their name is the place in the class list. Numbered by string, 10 is third: that is caught."""
  folder([0, 1, 2], ["0", "01", "2"], ["crow", "dog", "fox"])
  np.testing.assert_array_equal(create(("crow", "dog", "fox")).labels, [0, 1, 2])
  folder([0, 1, 2, 3], ["0", "1", "10", "2"], ["crow", "dog", "fox", "cat"])
  with pytest.raises(UserError, match="^class 2 is '10' in the data, but 'fox' in the class list"):
    create(("crow", "dog", "fox", "cat"))


def test_labels_that_are_digits_may_be_named_by_an_object(use, folder, fakes):
  """As the columns of a metadata.csv are, and folders that are called 1, 2, 3."""
  use(test=fakes.Source(["3", "10", "3"]))
  for lacking, missing in ((("cat", "dog"), "'10', '3'"), ({"3": "cat"}, "'10'"), (("3", "4"), "'10'")):
    with pytest.raises(UserError, match=f"not in the class list: {missing}; add them to it, or give an object"):
      create(lacking, label_field="label")
  np.testing.assert_array_equal(create({"3": "cat", "10": "dog"}, label_field="label").labels, [0, 1, 0])
  assert create(("10", "3"), label_field="label").names == ("10", "3")  # of digits, as they are
  folder([0, 1], ["1", "2"], ["cat", "dog"])
  assert create({"1": "cat", "2": "dog"}).names == ("cat", "dog")


def test_a_list_names_the_folders_of_wordnet_in_their_order(folder, fakes):
  """As configs/diffdis_cc3m.py and the page of evaluation ask for ImageNet's."""
  codes = ("n01440764", "n01443537", "n01484850")
  folder([0, 1, 2, 1], [*codes, codes[1]], ["tench", "goldfish", "shark", "goldfish"])
  evaluation = create(("tench", "goldfish", "shark"))
  np.testing.assert_array_equal(evaluation.labels, [0, 1, 2, 1])
  assert evaluation.run(fakes.Inference(["tench", "goldfish", "shark"]), {})["acc1"] == 1
  # Of some of the folders a list does not say which, nor of folders that are numbered in another order.
  for number, names in (([0, 1, 2, 1], ("tench", "goldfish", "shark", "crane")), ([0, 2, 1, 2], ("tench", "x", "y"))):
    folder(number, [*codes, codes[1]], ["tench", "goldfish", "shark", "goldfish"])
    with pytest.raises(UserError, match="^class 0 is 'n01440764' in the data, but 'tench' in the class list; .*object"):
      create(names)


def test_an_object_names_the_classes_of_the_data(folder, use, fakes, tmp_path):
  """Such as ImageNet's folders, which are named by codes. Its order is of no account."""
  folder([0, 1, 2, 1], ["n01", "n02", "n03", "n02"], ["crane", "dog", "fox", "dog"])
  file = tmp_path / "names.json"
  file.write_text('{"n03": "fox", "n02": "dog", "n04": "cat", "n01": "crane"}')
  for field in ("number", "class"):
    evaluation = create(str(file), label_field=field)
    assert [evaluation.names[i] for i in evaluation.labels] == ["crane", "dog", "fox", "dog"]
    assert evaluation.run(fakes.Inference(["crane", "dog", "fox"]), {})["acc1"] == 1
  same = {name: name for name in ("n02", "n03", "n01")}
  assert [create(same).names[i] for i in create(same).labels] == ["n01", "n02", "n03", "n02"]
  with pytest.raises(UserError, match="1 labels of the data are not in the class list: 'n02'"):
    create({"n01": "crane", "n03": "fox"})
  use(test=fakes.Source(["crane"], number=[0]))
  with pytest.raises(UserError, match="numbers without a name .*field 'class'.*; give a list"):
    create(str(file))


def test_names_of_the_data_go_by_name_in_any_order(folder, fakes):
  folder([0, 1, 2], list(ANIMALS))
  evaluation = create(("red fox", "brown dog", "black crow"), label_field="class")
  np.testing.assert_array_equal(evaluation.labels, [2, 1, 0])
  from_data = create("", label_field="class")
  assert from_data.names == ("Black crow", "brown dog", "red fox")  # in prompts as in captions
  assert from_data.run(fakes.Inference([name.lower() for name in from_data.names]), {})["acc1"] == 1


def test_a_prepared_folder_is_measured_by_name(tmp_path):
  for name in ("red_fox", "brown_dog"):
    (tmp_path / "raw" / name).mkdir(parents=True)
    (tmp_path / "raw" / name / "a.png").write_bytes(picture(0))
  prepare(own.classes(tmp_path / "raw"), tmp_path / "out", data_set=own.CLASSES)
  data = {"name": "pairs", "path": str(tmp_path / "out"), "split": "train", "image_size": 8}
  evaluation = evals.create("zero_shot", data=data, classnames=("brown dog", "red fox"))
  np.testing.assert_array_equal(evaluation.labels, [0, 1])
  with pytest.raises(UserError, match="^class 0 is 'brown_dog' in the data, but 'red fox' in the class list"):
    evals.create("zero_shot", data=data, classnames=("red fox", "brown dog"))


class Damaged:
  """A source whose second record cannot be read, or shows no image."""

  def __init__(self, source, image=None):
    self.source, self.image = source, image

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    if index == 1 and self.image is None:
      raise records.Unusable("unreadable record")
    return {**self.source[index], **({"image": self.image} if index == 1 else {})}


def test_a_damaged_record_is_one_clear_line(use, fakes):
  source = fakes.Source(["cat", "dog"])
  use(test=Damaged(source))
  for task in ("zero_shot", "retrieval"):
    with pytest.raises(UserError, match="record 1 of the data set cannot be used: unreadable record; download"):
      evals.create(task, data=DATA)
  use(test=Damaged(source, b"no image"))
  for task in ("zero_shot", "retrieval"):
    with pytest.raises(UserError, match="record 1 of the data set cannot be used: corrupt image; download"):
      evals.create(task, data=DATA).run(fakes.Inference(["cat", "dog"]), {})


def test_bad_class_lists(use, fakes):
  use(test=fakes.Source(LABELS))
  with pytest.raises(UserError, match="duplicates: 'red fox'"):
    evals.create("zero_shot", data=DATA, classnames=(*NAMES, "red fox"))
  with pytest.raises(UserError, match="2 labels of the data are not in the class list: 'green frog', 'white swan'"):
    evals.create("zero_shot", data=DATA, classnames=NAMES[:4])
