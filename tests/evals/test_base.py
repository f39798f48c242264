import numpy as np
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.evals import tasks as evals


def slow_ranks(queries, keys, query_groups, key_groups):
  """Count the keys of other groups that score at least as high as the best key of the query's group."""
  counts = []
  for query, group in zip(queries.astype(np.float64), query_groups, strict=True):
    scores = keys.astype(np.float64) @ query
    best = max(scores[key_groups == group])
    counts.append(sum(s >= best for s, g in zip(scores, key_groups, strict=True) if g != group))
  return counts


def test_ranks_equal_their_definition_for_any_size_of_block(monkeypatch):
  rng = np.random.default_rng(0)
  queries, keys = rng.normal(size=(37, 5)).astype(np.float32), rng.normal(size=(23, 5)).astype(np.float32)
  query_groups, key_groups = rng.integers(0, 6, 37), np.arange(23) % 6
  expected = slow_ranks(queries, keys, query_groups, key_groups)
  for block in (1024, 10):
    monkeypatch.setattr(base, "BLOCK", block)
    np.testing.assert_array_equal(base.ranks(queries, keys, query_groups=query_groups, key_groups=key_groups), expected)


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_collapsed_model_ranks_last(value):
  equal_rows = np.full((4, 3), value, np.float32)
  ranks = base.ranks(equal_rows, equal_rows, query_groups=np.arange(4), key_groups=np.arange(4))
  np.testing.assert_array_equal(ranks, 3)


def test_a_subset_is_ordered_repeatable_and_takes_all_classes():
  np.testing.assert_array_equal(base.subset(6, None), np.arange(6))
  np.testing.assert_array_equal(base.subset(3, 10), np.arange(3))
  chosen = base.subset(896, 112)
  np.testing.assert_array_equal(chosen, base.subset(896, 112))
  assert len(chosen) == 112 and (np.diff(chosen) > 0).all()
  assert len(set(chosen % 56)) > 40
  with pytest.raises(UserError, match="no records"):
    base.subset(0, None)
  with pytest.raises(UserError, match="num_images is 0"):
    base.subset(5, 0)


def test_unknown_evaluations_and_settings_are_refused():
  with pytest.raises(UserError, match=r"unknown task 'zeroshot'; did you mean zero_shot\?"):
    evals.create("zeroshot")
  with pytest.raises(UserError, match=r"zero_shot has no setting 'label_fields'; did you mean label_field\?"):
    evals.create("zero_shot", data={}, label_fields="concept")
  with pytest.raises(UserError, match="zero_shot: data is 'path'; it must be a section of fields"):
    evals.create("zero_shot", data="path")
  with pytest.raises(UserError, match="data of evaluation retrieval: .*'pth'"):
    evals.create("retrieval", data={"name": "pairs", "image_size": 8, "pth": "x"})


@pytest.mark.parametrize(
  "task, settings, message",
  [
    ("zero_shot", {"templates": 5}, "zero_shot: templates is 5; it must be a list or a text"),
    ("linear_probe", {"shots": "16"}, "linear_probe: shots is '16'; it must be a list"),
    ("zero_shot", {"classnames": True}, "zero_shot: classnames is True; it must be "),
    ("zero_shot", {"num_images": "many"}, "zero_shot: num_images is 'many'; it must be a whole number"),
    ("zero_shot", {"shuffle_labels": "yes"}, "shuffle_labels is 'yes'; it must be True or False"),
    ("retrieval", {"caption_field": 3}, "retrieval: caption_field is 3; it must be a text"),
    ("generation_accuracy", {"per_class": 1.5}, "generation_accuracy: per_class is 1.5; it must be a whole number"),
    ("generation_accuracy", {"required_accuracy": "high"}, "required_accuracy is 'high'; it must be a number"),
    ("retrieval", {"seed": -1}, "seed is -1; it must be at least 0 and at most 4294967295"),
  ],
)
def test_a_setting_of_a_wrong_type_is_refused(task, settings, message):
  data = {} if task == "generation_accuracy" else {"data": {"name": "shapes", "image_size": 8}}
  with pytest.raises(UserError, match=message):
    evals.create(task, **data | settings)
