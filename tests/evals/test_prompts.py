import json

import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts


def write(path, value):
  path.write_text(value if isinstance(value, str) else json.dumps(value))
  return str(path)


def test_fill_reads_both_ways_of_marking_the_place():
  assert prompts.fill("a {} and a {c}.", "cat") == "a cat and a cat."
  assert prompts.fill("a photo of {}.", r"a {c} \1") == r"a photo of a {c} \1."


def test_defaults_agree_with_clip_benchmark():
  datasets = pytest.importorskip("clip_benchmark.datasets")
  with open(f"{datasets.__path__[0]}/en_zeroshot_classification_templates.json") as file:
    theirs = {template.replace("{c}", "{}") for template in json.load(file)["imagenet1k"]}
  assert set(prompts.TEMPLATES) <= theirs


def test_files_and_sequences_give_the_same(tmp_path):
  file = write(tmp_path / "names.json", ["cat", "dog"])
  assert prompts.resolve_classnames(file) == prompts.resolve_classnames(["cat", "dog"]) == ("cat", "dog")
  file = write(tmp_path / "templates.json", ["a {}", "the {c}"])
  assert prompts.resolve_templates(file) == ("a {}", "the {c}")
  assert prompts.resolve_templates("") == prompts.resolve_templates(()) == prompts.TEMPLATES


@pytest.mark.parametrize("value", ["not json", {"0": "cat"}, [], ["cat", 3], ["cat", ""]])
def test_bad_files(tmp_path, value):
  with pytest.raises(UserError, match="names.json"):
    prompts.resolve_classnames(write(tmp_path / "names.json", value))


def test_missing_file():
  with pytest.raises(UserError, match="cannot read class names from nowhere.json"):
    prompts.resolve_classnames("nowhere.json")


def test_duplicates_are_named():
  assert prompts.repeated(["crane", "cat", "maillot", "crane", "maillot"]) == "'crane', 'maillot'"
  assert prompts.repeated(["crane", "cat"]) == ""


def test_template_without_a_place():
  with pytest.raises(UserError, match="'a photo' has no place"):
    prompts.resolve_templates(["a {}", "a photo"])
