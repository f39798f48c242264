"""The steps by the command line, and a measured one beside what preflight said of it."""

from __future__ import annotations

import json
import types

import jax
import pytest

from configs import places_lt
from diffdis_jax.benchmark import __main__ as benchmark
from diffdis_jax.benchmark import steps
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError
from diffdis_jax.run import provenance
from diffdis_jax.training.step import abstract_batch
from tests import tiny
from tests.command_runs import call
from tests.steps import make_mesh

pytest_plugins = ("tests.command_runs",)
SECONDS = dict(joint=0.09, generation=0.06, discrimination=0.04)
TRAIN = dict(chip="TPU v5", chips=4, images=64, seconds=0.06, seconds_by_cycles=0.09, seconds_bound=0.03)


@pytest.mark.parametrize(
  "objectives, measured",
  [(("generation", "discrimination"), 0.09), (("generation",), 0.06), (("discrimination",), 0.04)],
)
def test_the_step_of_the_configs_objectives_is_over_each_time_that_was_given(objectives, measured):
  # "TPU v5p" is another name of the same chip.
  name, train = steps.preflighted(dict(train=TRAIN), objectives, batch_size=64, chips=4, kind="TPU v5p")
  found = steps.beside_preflight(name, train, SECONDS[name])
  assert found["over"] == pytest.approx(
    dict(seconds=measured / 0.06, seconds_by_cycles=measured / 0.09, seconds_bound=measured / 0.03)
  )
  assert found["measured"] == measured and found["chip"] == "TPU v5"


@pytest.mark.parametrize(
  "report, objectives, message",
  [
    (dict(generation=TRAIN), ("generation",), "what preflight wrote"),
    (dict(train=TRAIN), ("reconstruction",), "objectives generation"),
    (dict(train=TRAIN | dict(images=32)), ("generation",), "of 32 images on 4 x TPU v5; here are 64 images"),
    (dict(train=TRAIN | dict(chips=8)), ("generation",), "of 64 images on 8 x TPU v5; here are 64 images on 4"),
    (dict(train=TRAIN | dict(chip="NVIDIA H100 80GB HBM3")), ("generation",), "HBM3; here are 64 images on 4 x TPU v5"),
  ],
)
def test_a_report_of_another_step_is_refused(report, objectives, message):
  with pytest.raises(UserError, match=message):
    steps.preflighted(report, objectives, batch_size=64, chips=4, kind="TPU v5")


@pytest.mark.parametrize(
  "fields, names",
  [
    ({}, {"image", "tokens"}),
    ({"data.discrimination_view": "own"}, {"image", "tokens", "discrimination_image"}),
    ({"data.name": "latents"}, {"mean", "log_variance", "tokens"}),
  ],
)
def test_the_batch_is_one_that_the_run_trains_on(fields, names):
  """In its kind and in all of its shapes; else another step is timed than trains, and than preflight has compiled."""
  run = Run.of(tiny.get_config()).replace(fields)
  trainer = steps.Trainer(run, make_mesh(1))
  batch = steps.random_batch(trainer)
  assert {name for name, each in vars(batch).items() if each is not None} == names
  shapes = [
    [(each.shape, each.dtype, each.sharding) for each in jax.tree.leaves(found)]
    for found in (batch, abstract_batch(run, trainer.network, trainer.mesh))
  ]
  assert shapes[0] == shapes[1]


def test_a_step_of_one_task_has_no_switch_of_the_other(monkeypatch):
  """Which a run of that task alone refuses, so that no config with such a switch could be timed."""
  switches = {"snr_gamma": 5.0}
  run = Run.of(tiny.get_config()).replace({f"loss.{name}": x for name, x in switches.items()})
  monkeypatch.setattr(benchmark, "FLAGS", types.SimpleNamespace(preflight=None, rounds=1))
  monkeypatch.setattr(benchmark, "Trainer", lambda run, mesh: run)
  monkeypatch.setattr(steps, "time_steps", lambda trainers, rounds: trainers)
  found = {
    name: {switch for switch in switches if getattr(each.loss, switch)}
    for name, each in benchmark.time_steps(run).items()
  }
  assert found == {
    "joint": {*switches},
    "generation": {"snr_gamma"},
    "discrimination": set(),
  }


@pytest.mark.parametrize("config", [tiny.get_config("autoencoder"), places_lt.get_config("stage=1,backbone=clip")])
def test_a_config_of_another_step_is_refused_by_what_it_trains(config):
  """And not told to take the config that it is of, or to train an autoencoder first."""
  run = Run.of(config)
  with pytest.raises(UserError, match=f"and this config's objective is {run.objectives[0]}; its own pace is in"):
    benchmark.time_steps(run)


def test_operations_of_loops_count_as_often_as_they_turn():
  """Of microbatches, and of heads of attention on a CPU; the compiler counts one of them."""
  loop = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]
  traced = jax.jit(loop).trace(jax.ShapeDtypeStruct((16, 16), "float32"))
  found = steps.operations_of(traced, traced.lower().compile(), devices=2)
  assert found == pytest.approx(2 * 7 * 2 * 16**3, rel=0.01)


@pytest.mark.parametrize("content", [None, "{", "3"])
def test_a_file_that_preflight_did_not_write_is_refused(tmp_path, content):
  file = tmp_path / "preflight.json"
  if content is not None:
    file.write_text(content)
  with pytest.raises(UserError, match=r"preflight\.json is no file that preflight --out wrote"):
    benchmark.read_preflight(str(file))


def test_a_preflight_of_another_benchmark_is_refused(environment, tmp_path):
  flags = ("--config=table6", f"--preflight={tmp_path / 'preflight.json'}", f"--out={tmp_path / 'out.json'}")
  done = call("benchmark", environment, "table6", *flags)
  assert (done.returncode, done.stderr) == (2, "error: --preflight is of steps alone; leave it out of table6\n")


def test_the_record_says_what_was_timed_where(environment, tmp_path):
  out = tmp_path / "benchmark.json"
  flags = ("--config=tests/tiny.py", "--config.seed=5", "--config.data.path=/somewhere/shapes", "--rounds=1")
  flags += ("--config.model.unet.attention=(False,)",)  # three steps are compiled, which is what this test costs
  done = call("benchmark", environment, *flags, f"--out={out}")
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  config = tiny.get_config()
  config.update(seed=5)
  config.data.path, config.model.unet.attention = "shapes", (False,)
  made = found["provenance"]
  assert made.items() >= provenance.code().items() and made["device"] == {"kind": "cpu", "count": 1}
  assert made["run"] == provenance.of_config(config.to_dict())
  assert made["run"]["objectives"] == ["generation", "discrimination"] and made["run"]["seed"] == 5
  assert found["joint_over_generation"] > 0 and "/" not in json.dumps(made)
