import json

import pytest

from diffdis_jax.data import sources
from diffdis_jax.structs import UserError


def test_shapes():
  source = sources.make(name="shapes", split="unseen", image_size=24, num_images=5, seed=3)
  assert len(source) == 5 and source[4]["image"].shape == (24, 24, 3) and not source[4]["seen"]
  assert len(sources.make(name="shapes", image_size=24)) == 65536


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"name": "laion"}, "unknown data source 'laion'; there are shapes, pairs"),
    ({"name": "shapes", "split": "val"}, "shapes has no split 'val'; there are train, test, unseen, all"),
    ({"name": "shapes", "num_images": 0}, "num_images is 0; at least 1"),
    ({"name": "pairs"}, "no prepared data set in ''; write one with python -m diffdis_jax.prepare_data pairs"),
    ({"name": "pairs", "path": "nowhere"}, "no prepared data set in 'nowhere'"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(UserError, match=message):
    sources.make(**arguments, image_size=32)


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
  (tmp_path / "dataset_info.json").write_text("{}")
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="no prepared data set in ''"):
    sources.make(name="pairs", image_size=32)


def test_pairs_fields():
  """The stored image, caption and key win over fields of the same name in the json."""
  metadata = {"caption": "inner", "key": "k", "image": "i", "concept": "bear"}
  record = {"image": b"bytes", "caption": b"outer \xc3\xbc", "key": b"t/0", "metadata": json.dumps(metadata).encode()}
  source = sources.Pairs([record] * 3, num_images=2)
  assert len(source) == 2 and len(sources.Pairs([record] * 3, num_images=9)) == 3
  assert source[1] == {"image": b"bytes", "caption": "outer ü", "key": "t/0", "concept": "bear"}
  with pytest.raises(IndexError):
    source[2]
