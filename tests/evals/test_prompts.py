import inspect
import json

import pytest
from clip_benchmark import datasets

from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts


def write(path, value):
  path.write_text(value if isinstance(value, str) else json.dumps(value))
  return str(path)


def test_fill_replaces_both_kinds_of_placeholder():
  assert prompts.fill("a {} and a {c}.", "cat") == "a cat and a cat."
  assert prompts.fill("a photo of {}.", r"a {c} \1") == r"a photo of a {c} \1."


def test_defaults_agree_with_clip_benchmark():
  with open(f"{datasets.__path__[0]}/en_zeroshot_classification_templates.json") as file:
    theirs = {template.replace("{c}", "{}") for template in json.load(file)["imagenet1k"]}
  assert set(prompts.TEMPLATES) <= theirs


def test_files_and_sequences_give_the_same(tmp_path):
  file = write(tmp_path / "names.json", ["cat", "dog"])
  expected = prompts.ClassNames(names=("cat", "dog"), keys=("cat", "dog"))
  assert prompts.resolve_classnames(file) == prompts.resolve_classnames(["cat", "dog"]) == expected
  file = write(tmp_path / "object.json", {"n02123045": "cat", "n02084071": "dog"})
  expected = prompts.ClassNames(names=("cat", "dog"), keys=("n02123045", "n02084071"), by_key=True)
  assert prompts.resolve_classnames(file) == expected
  file = write(tmp_path / "templates.json", ["a {}", "the {c}"])
  assert prompts.resolve_templates(file) == ("a {}", "the {c}")
  assert prompts.resolve_templates("") == prompts.resolve_templates(()) == prompts.TEMPLATES


@pytest.mark.parametrize(
  "value", ["not json", {"0": ["n01440764", "tench"]}, {}, {"0": ""}, [], ["cat", 3], ["cat", ""]]
)
def test_invalid_class_names_are_refused(tmp_path, value):
  message = "names.json" if isinstance(value, str) else "class names are .*give a list of texts, or an object"
  with pytest.raises(UserError, match=message):
    prompts.resolve_classnames(write(tmp_path / "names.json", value))


def test_underscores_and_case_of_names_do_not_matter():
  assert prompts.comparable("Polar_bear ") == prompts.comparable("polar  Bear") == "polar bear"
  assert prompts.comparable("polar-bear") != prompts.comparable("polar bear")


@pytest.mark.parametrize("template", ["a photo", 3])
def test_a_template_without_a_placeholder_is_refused(template):
  with pytest.raises(UserError, match=f"{template!r} has no place"):
    inspect.unwrap(prompts.resolve_templates)(["a {}", template])
