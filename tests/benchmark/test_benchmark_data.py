"""The data benchmark's parts at tiny sizes: what is timed does what it says."""

import io

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.benchmark import data
from diffdis_jax.data import sources


@pytest.fixture
def small(monkeypatch):
  changes = dict(SOURCE=48, CROP=16, SHORT_SIDE=24, BATCH=4, LATENT=(2, 2, 8), LONG=600, SHARDS=6)
  changes["BATCHES"] = dict.fromkeys(data.BATCHES, 2)
  for name, value in changes.items():
    monkeypatch.setattr(data, name, value)


def test_every_way_is_timed(small, tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / "raw").mkdir()
  images = [data.photo(rng, 48) for _ in range(4)]
  data.write_tar(tmp_path / "raw" / "train-00000.tar", images, 12, seed=0)
  speeds = data.prepare_speed(tmp_path / "raw", tmp_path, 12)
  assert speeds.keys() == {"prepare_kept_per_core", "prepare_reencoded_per_core"}
  sizes = {}
  for name in ("kept", "reencoded"):
    source = sources.open_source(name="pairs", path=tmp_path / name, image_size=16)
    assert len(source) == 12 and len({source[i]["caption"] for i in range(12)}) > 6
    sizes[name] = Image.open(io.BytesIO(source[0]["image"])).size
  assert sizes == {"kept": (48, 48), "reencoded": (24, 24)}
  data.write_latents(tmp_path)
  results = data.loader_speed(tmp_path, rounds=1)
  rates = results["images_per_second"]
  assert rates.keys() == {"bare", "bare_short_side", "source", "short_side", "latents"}
  assert results["loader_over_bare"] == rates["source"] / rates["bare"]


def test_a_long_data_set_starts_anywhere(small, tmp_path):
  results = data.first_batch(tmp_path)
  assert len(results["first_batch"]) == 4 and results["first_batch_seconds"] > 0
  assert len(sources.open_source(name="pairs", path=tmp_path / "long", image_size=16)) == 600
