"""The data benchmark's parts at tiny sizes: what is timed does what it says."""

import io

import pytest
from PIL import Image

from diffdis_jax.benchmark import data
from diffdis_jax.config.data import Loading
from diffdis_jax.config.run import Run
from diffdis_jax.data import sources
from diffdis_jax.training.step import Trainer
from tests import tiny
from tests.benchmark import data_bars
from tests.steps import make_mesh


@pytest.fixture
def small(monkeypatch):
  for name, value in dict(SOURCE=48, CROP=16, SHORT_SIDE=24, BATCH=4, REPEATS=3).items():
    monkeypatch.setattr(data, name, value)
  changes = dict(LATENT=(2, 2, 8), LONG=600, SHARDS=6, BATCHES=dict.fromkeys(data_bars.BATCHES, 2))
  for name, value in changes.items():
    monkeypatch.setattr(data_bars, name, value)


def test_every_way_is_timed(small, tmp_path):
  speeds = data.prepare_speed(data.write_photos(tmp_path, 4), tmp_path, 12)
  assert speeds.keys() == {"prepare_kept_per_core", "prepare_reencoded_per_core"}
  sizes = {}
  for name in ("kept", "reencoded"):
    source = sources.open_source(name="pairs", path=tmp_path / name, image_size=16)
    assert len(source) == 12 and len({source[i]["caption"] for i in range(12)}) > 6
    sizes[name] = Image.open(io.BytesIO(source[0]["image"])).size
  assert sizes == {"kept": (48, 48), "reencoded": (24, 24)}
  data_bars.write_latents(tmp_path)
  results = data_bars.loader_speeds(tmp_path, rounds=1)
  rates = results["images_per_second"]
  assert rates.keys() == {"bare", "bare_short_side", "source", "short_side", "latents"}
  assert results["loader_over_bare"] == rates["source"] / rates["bare"]


def test_a_small_models_steps_wait_for_what_was_prepared(small, tmp_path):
  data.prepare_speed(data.write_photos(tmp_path, 4), tmp_path, 12)
  # Of little to compile: the steps' time is what is measured, whatever they train.
  changes = {"batch_size": 4, "objectives": ("generation",), "model.unet.attention": (False,)}
  run = Run.of(tiny.get_config()).replace(changes)
  found = data.data_wait(Trainer(run, make_mesh(1)), tmp_path / "reencoded", steps=2)
  assert 0 <= found["data_wait"] <= 1 and found["small_model_steps_per_second"] > 0


def test_a_long_data_set_starts_anywhere(small, tmp_path):
  results = data_bars.first_batch(tmp_path)
  assert len(results["first_batch"]) == 4 and results["first_batch_seconds"] > 0
  assert len(sources.open_source(name="pairs", path=tmp_path / "long", image_size=16)) == 600


def test_distant_records_are_timed_both_ways(monkeypatch):
  monkeypatch.setattr(data_bars, "ANSWER", 0.001)
  rates = data_bars.distant(Loading(num_threads=2, prefetch=2), rows=4, seconds=0.1)
  assert rates.keys() == {"distant_images_alone", "distant_images_per_second"} and min(rates.values()) > 0
