"""Test which step the command line times."""

from __future__ import annotations

import json

import jax
import pytest

from configs import places_lt
from diffdis_jax.benchmark import __main__ as benchmark
from diffdis_jax.benchmark import table6
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError
from diffdis_jax.run import provenance
from diffdis_jax.training.step import Trainer, abstract_batch
from tests import tiny
from tests.command_runs import call
from tests.steps import make_mesh

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)


@pytest.mark.parametrize(
  "fields, names",
  [
    ({}, {"image", "tokens"}),
    ({"data.discrimination_view": "own"}, {"image", "tokens", "discrimination_image"}),
    ({"data.name": "latents"}, {"mean", "log_variance", "tokens"}),
  ],
)
def test_the_batch_is_one_that_the_run_trains_on(fields, names):
  """A batch has the kind and shapes of training and preflight; otherwise another step would be timed."""
  run = Run.of(tiny.get_config()).replace(fields)
  trainer = Trainer(run, make_mesh(1))
  batch = table6.random_batch(trainer)
  assert {name for name, array in vars(batch).items() if array is not None} == names
  shapes = lambda batch: [(array.shape, array.dtype, array.sharding) for array in jax.tree.leaves(batch)]
  assert shapes(batch) == shapes(abstract_batch(run, trainer.network, trainer.mesh))


def test_a_step_of_one_task_has_no_switch_of_the_other():
  """A run of that task alone refuses the switch, so a config with it could not be timed."""
  run = Run.of(tiny.get_config()).replace({"loss.snr_gamma": 5.0})
  trainers = benchmark.trainers(run).items()
  assert {name for name, trainer in trainers if trainer.run.loss.snr_gamma} == {"joint", "generation"}


@pytest.mark.parametrize("config", [tiny.get_config("autoencoder"), places_lt.get_config("stage=1,backbone=clip")])
def test_a_config_of_another_step_is_refused_by_what_it_trains(config):
  """The message does not tell the user to take another config, or to train an autoencoder first."""
  run = Run.of(config)
  with pytest.raises(UserError, match=f"and this config's objective is {run.objectives[0]}; its own pace is in"):
    benchmark.trainers(run)


def test_the_record_says_what_was_timed_where(environment, tmp_path):
  out = tmp_path / "benchmark.json"
  flags = ("--config=tests/tiny.py", "--config.seed=5", "--config.data.path=/somewhere/shapes", "--rounds=1")
  flags += ("--config.model.unet.attention=(False,)",)  # compiling three steps is most of this test's cost
  done = call("benchmark", environment, *flags, f"--out={out}")
  assert done.returncode == 0, done.stderr
  record = json.loads(out.read_text())
  config = tiny.get_config()
  config.update(seed=5)
  config.data.path, config.model.unet.attention = "shapes", (False,)
  origin = record["provenance"]
  assert origin.items() >= provenance.code().items() and origin["device"] == {"kind": "cpu", "count": 1}
  assert origin["run"] == provenance.of_config(config.to_dict())
  assert origin["run"]["objectives"] == ["generation", "discrimination"] and origin["run"]["seed"] == 5
  assert record["joint_over_generation"] > 0 and "/" not in json.dumps(origin)
