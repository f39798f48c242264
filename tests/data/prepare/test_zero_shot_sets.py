from __future__ import annotations

import functools

import numpy as np
import pytest

from diffdis_jax.data import sources, transforms
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.data.prepare import builder, zero_shot_sets
from diffdis_jax.errors import UserError
from tests import benchmark_sets


@pytest.mark.parametrize("name", ["cifar10", "caltech101", "imagenet1k"])
def test_prepared_it_is_the_same_set(tmp_path, monkeypatch, name):
  """Pixels that have no bytes become PNG, others keep theirs; numbers, names and order stay."""
  monkeypatch.setattr(zero_shot_sets.parts, "ITEMS", 3)
  raw, out = tmp_path / "raw", tmp_path / "prepared" / name
  benchmark_sets.TORCHVISION[name](raw)
  parts = zero_shot_sets.find_parts(name, raw)
  builder.prepare(parts, out, builder=zero_shot_sets.ZeroShotSet, settings=builder.Settings(num_processes=1))
  before, after = (sources.open_source(name=name, path=path, image_size=8) for path in (raw, out.parent))
  assert (before.origin.layout, after.origin.layout) == ("torchvision", "prepared")
  assert before.origin.split == after.origin.split
  assert after.labels.tolist() == before.labels.tolist() and len({*after.labels.tolist()}) > 2
  for i in range(len(before)):
    shown = [np.asarray(transforms.decode(source[i]["image"])) for source in (before, after)]
    np.testing.assert_array_equal(*shown)
    assert name == "cifar10" or before[i]["image"] == after[i]["image"]
  split = "train" if after.origin.split == "all" else after.origin.split
  pairs = sources.open_source(name="pairs", path=out, split=split, image_size=8)
  record, known = pairs[0], class_lists.load()[name]
  assert record["label"] == before.labels[0] and record["caption"] == known.classnames[record["label"]]


def test_what_is_not_there(tmp_path):
  find = functools.partial(zero_shot_sets.find_parts, "pets")
  for source, message in ((tmp_path, "no pets in "), (tmp_path / "x", "no folder .*in which pets lies")):
    with pytest.raises(UserError, match=message):
      find(source)
