"""Class names and templates equal the lists of those who published them."""

from __future__ import annotations

import json
import pathlib

import clip_benchmark.datasets
import numpy as np
import open_clip
import pytest

from diffdis_jax.data.layouts import class_lists
from diffdis_jax.errors import UserError

FOLDER = pathlib.Path(str(clip_benchmark.datasets.__path__[0]))
COUNTS = dict(cifar10=10, cifar100=100, caltech101=102, cars=196, flowers=102, food101=101, sun397=397, dtd=47)
COUNTS |= dict(fgvc_aircraft=100, pets=37, eurosat=10, imagenet1k=1000)


def theirs(what):
  return json.loads((FOLDER / f"en_{what}.json").read_text())


def test_they_are_clip_benchmarks_and_open_clips():
  names, templates = theirs("classnames"), theirs("zeroshot_classification_templates")
  lists = class_lists.load()
  assert {name: len(known.classnames) for name, known in lists.items()} == COUNTS
  for name, known in lists.items():
    assert [template.replace("{}", "{c}") for template in known.templates] == templates[name]
    if name in names:
      assert [*known.classnames] == names[name]
  imagenet = lists["imagenet1k"]
  assert [*imagenet.classnames] == [*open_clip.IMAGENET_CLASSNAMES]
  filled = [template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
  assert [template.replace("{}", "cat") for template in imagenet.templates] == filled


def test_classes_go_by_name():
  known = class_lists.ClassList("pets", ("Abyssinian", "American Bulldog", "pug"), ())
  places = class_lists.match(["pug", "/a/american_bulldog", "ABYSSINIAN"], known, where="x")
  np.testing.assert_array_equal(places, [2, 1, 0])
  with pytest.raises(UserError, match="x: class 1 is 'cat', which is none of the 3 classes of pets"):
    class_lists.match(["pug", "cat"], known, where="x")
  with pytest.raises(UserError, match="x has the classes 'pug' and 'Pug', which are the same class"):
    class_lists.match(["pug", "Abyssinian", "Pug"], known, where="x")


def test_where_names_do_not_tell_the_order_has_to():
  known = class_lists.ClassList("imagenet1k", ("missile", "cat", "missile"), (), ("n1", "n2", "n3"))
  np.testing.assert_array_equal(class_lists.match(["missile", "cat", "missile"], known, where="x"), [0, 1, 2])
  np.testing.assert_array_equal(class_lists.match(["n3", "n1"], known, where="x"), [2, 0])
  message = "x has a class list of another order: class 0 is 'cat', which should be class 1; as two classes have one"
  with pytest.raises(UserError, match=message):
    class_lists.match(["cat", "missile", "missile"], known, where="x")
