"""The data benchmark's parts at tiny sizes: what is timed does what it says."""

import io
import itertools
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest
from clu.metrics import Average
from PIL import Image

from diffdis_jax.config.data import Loading
from diffdis_jax.config.run import Run
from diffdis_jax.data import sources
from diffdis_jax.training import metrics
from diffdis_jax.training.step import Trainer
from tests import tiny
from tests.benchmark import data_bars, photographs
from tests.benchmark import data_speed as data
from tests.benchmark.read_ahead import Clock, ReadAhead
from tests.steps import make_mesh


@pytest.fixture
def small(monkeypatch):
  for module, changes in ((table6, dict(SOURCE=48, REPEATS=3)), (data, dict(CROP=16, SHORT_SIDE=24, BATCH=4))):
    for name, value in changes.items():
      monkeypatch.setattr(module, name, value)
  changes = dict(LATENT=(2, 2, 8), LONG=600, SHARDS=6, BATCHES=dict.fromkeys(data_bars.BATCHES, 2))
  for name, value in changes.items():
    monkeypatch.setattr(data_bars, name, value)


def test_every_way_is_timed(small, tmp_path):
  speeds = data.prepare_speed(photographs.write_photos(tmp_path, 4), tmp_path, 12)
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
  data.prepare_speed(photographs.write_photos(tmp_path, 4), tmp_path, 12)
  # Of little to compile: the steps' time is what is measured, whatever they train.
  changes = {"batch_size": 4, "objectives": ("generation",), "model.unet.attention": (False,)}
  run = Run.of(tiny.get_config()).replace(changes)
  found = data.data_wait(Trainer(run, make_mesh(1)), tmp_path / "reencoded", steps=2)
  assert 0 <= found["data_wait"] <= 1 and found["small_model_steps_per_second"] > 0


def test_what_was_read_before_the_clock_starts_does_not_count(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(data, "time", clock)
  monkeypatch.setattr(data, "BATCH", 1)
  seconds = {"source": 0.02, "short_side": 0.01}
  iterators = {name: ReadAhead(clock, ahead=2, seconds=each) for name, each in seconds.items()}
  found = data.loader_speed(iterators, {"source": 5, "short_side": 10}, rounds=3)
  assert found["images_per_second"] == pytest.approx({"source": 50, "short_side": 100})


def test_steps_wait_as_in_a_long_training(monkeypatch):
  """And not as long as batches last that were read while the step compiled."""
  run, clock = Run.of(tiny.get_config()), Clock()
  batch = dict(image=np.zeros((run.batch_size, 16, 16, 3), np.uint8), tokens=np.zeros((run.batch_size, 8), np.int32))
  batches = ReadAhead(clock, ahead=run.data.loader.prefetch, seconds=0.05, batch=batch)
  monkeypatch.setattr(data, "open_loader", lambda run: batches)
  nothing = types.SimpleNamespace(take=lambda batch: batch, report=lambda gather: {})
  monkeypatch.setattr(metrics.loader, "Substitutions", lambda: nothing)
  monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=clock.perf_counter))
  loss = Average(total=jnp.ones(()), count=jnp.ones(()))
  taken = itertools.chain([10.0], itertools.repeat(0.02))  # the first one compiles
  train_step = lambda *args: clock.sleep(next(taken)) or (None, {"loss": loss, "skipped": loss})
  monkeypatch.setattr(Trainer, "init_params", lambda self, key: {})
  monkeypatch.setattr(Trainer, "with_params", lambda self, params: None)
  trainer = object.__new__(Trainer)
  vars(trainer).update(run=run, mesh=make_mesh(1), train_step=train_step)
  found = data.data_wait(trainer, pathlib.Path("nowhere"), steps=4)
  assert found == pytest.approx({"data_wait": 0.6, "small_model_steps_per_second": 20})


def test_a_long_data_set_starts_anywhere(small, tmp_path):
  results = data_bars.first_batch(tmp_path)
  assert len(results["first_batch"]) == 4 and results["first_batch_seconds"] > 0
  assert len(sources.open_source(name="pairs", path=tmp_path / "long", image_size=16)) == 600


def test_distant_records_are_timed(monkeypatch):
  monkeypatch.setattr(data_bars, "ANSWER", 0.001)
  rates = data_bars.distant(Loading(num_threads=2, prefetch=2), rows=4, seconds=0.1)
  assert rates["distant_images_per_second"] > 0
