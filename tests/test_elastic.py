"""A checkpoint of one mesh is resumed on another, and by another number of hosts."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from clu.metrics import Average

from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.run import checkpoint
from diffdis_jax.training import loop, start
from diffdis_jax.training.metrics import Meters
from tests import steps
from tests.models.networks import random_params
from tests.steps import build_trainer

pytestmark = pytest.mark.slow

SAVED_ON = (2, 2, 2)
STEPS = 3


@pytest.fixture(scope="module")
def config():
  config = steps.make_config("discrimination")
  config.model.text_encoder.update(vocab_size=49408, bos_id=49406, eos_id=49407)
  return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory, config):
  """Workdir, state and next global batch of a run of three steps."""
  path = str(tmp_path_factory.mktemp("elastic"))
  trainer = build_trainer(config, steps.make_mesh(*SAVED_ON))
  params = jax.device_put(random_params(trainer.shapes, seed=0), trainer.param_shardings)
  state = trainer.with_params(params)
  iterator = steps.open_batches(config)
  for _ in range(STEPS):
    next(iterator)
  meta = {"totals": {"loss": [float(np.float32(0.1)), 3.0]}, "substituted": []}
  with checkpoint.Checkpointer(path) as checkpointer:
    checkpointer.save(STEPS, state, iterator, meta=meta)
  return path, jax.device_get(state), next(iterator)


@pytest.mark.parametrize("shape", [(4, 2, 1), (8, 1, 1), (1, 1, 1)])
def test_on_another_mesh_every_bit_and_the_next_batch_are_the_same(saved, config, shape):
  path, expected, next_batch = saved
  trainer, iterator = build_trainer(config, steps.make_mesh(*shape)), steps.open_batches(config)
  with checkpoint.Checkpointer(path) as checkpointer:
    state, meta = start.restore_or_init(trainer, checkpointer, iterator)
  assert int(state.step) == STEPS
  for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.abstract_state), strict=True):
    assert leaf.sharding == like.sharding and leaf.dtype == like.dtype
  for (name, a), b in zip(
    jax.tree.leaves_with_path((expected.params, expected.ema, expected.opt_state)),
    jax.tree.leaves((state.params, state.ema, state.opt_state)),
    strict=True,
  ):
    assert np.asarray(b).tobytes() == a.tobytes(), jax.tree_util.keystr(name)
  for path, leaf in state.params.items():
    assert leaf.sharding == trainer.param_shardings[path]
  assert meta["totals"] == {"loss": [float(np.float32(0.1)), 3.0]}
  for name, values in next(iterator).items():
    np.testing.assert_array_equal(values, next_batch[name])


@pytest.mark.parametrize("hosts", [2])
def test_by_another_number_of_hosts_the_next_global_batch_is_the_same(saved, config, hosts):
  """Rows as sharding.local_rows gives them on a mesh whose hosts hold no contiguous ones."""
  path, _, next_batch = saved
  trainer = build_trainer(config, steps.make_mesh(*SAVED_ON))
  found = {name: np.zeros_like(values) for name, values in next_batch.items()}
  for host in range(hosts):
    rows = [row for row in range(config.batch_size) if row // 2 % hosts == host]
    iterator = steps.open_batches(config, rows)
    with checkpoint.Checkpointer(path) as checkpointer:
      start.restore_or_init(trainer, checkpointer, iterator)
    for name, values in next(iterator).items():
      found[name][rows] = values
  for name, values in next_batch.items():
    np.testing.assert_array_equal(found[name], values)


def keep(workdir, metrics: dict[int, float | None], **options) -> list[int]:
  """The steps that are left after saves with these metrics."""
  for step, value in metrics.items():  # a checkpointer each: what was saved before is known after a restart
    with checkpoint.Checkpointer(workdir, checkpoint.CheckpointPolicy(**options)) as checkpointer:
      params = {"a": np.full(3, step, np.float32)}
      state = steps.TrainState(step=step, params=jax.device_put(params), ema={}, opt_state=())
      checkpointer.save(step, state, metrics={} if value is None else {"test/acc1": value})
  folders = (workdir / "checkpoints").iterdir()
  return sorted(int(path.name) for path in folders if path.name.isdigit())


@pytest.mark.parametrize("best_is, best", [("max", [2, 5]), ("min", [1, 4])])
def test_keeps_the_best_beside_the_last_and_every_tenth(tmp_path, best_is, best):
  metrics = {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: 0.8, 10: 0.5, 11: None, 12: 0.5}
  options = dict(keep_last=1, keep_every=10, keep_best=2, best_metric="test/acc1", best_is=best_is)
  assert keep(tmp_path, metrics, **options) == [*best, 10, 12]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"keep_best": 1}, "keep_best is 1 and best_metric ''; keep_best needs the name of a metric"),
    ({"best_metric": "a/b"}, "keep_best is 0 and best_metric 'a/b'; keep_best needs the name of a metric"),
    (
      {"keep_best": 1, "best_metric": "a/b", "best_is": "highest"},
      "best_is is 'highest'; it must be one of max, min",
    ),
  ],
)
def test_keep_policies_that_contradict_themselves(options, message):
  with pytest.raises(UserError, match=message):
    checkpoint.CheckpointPolicy(**options)


def test_the_best_metric_is_of_an_evaluation_in_training(config, tmp_path):
  bad = config.copy_and_resolve_references()
  bad.checkpoint.update(keep_best=1, best_metric="test/acc1")
  with pytest.raises(UserError, match="best_metric=test/acc1 should be NAME/METRIC, of one of train_evals"):
    loop.train_and_evaluate(Run.of(bad), str(tmp_path / "run"))
  bad.train_evals = ("test",)
  for name in ("test", "test/"):
    bad.checkpoint.best_metric = name
    with pytest.raises(UserError, match=f"best_metric={name} should be NAME/METRIC, of one of train_evals"):
      Run.of(bad)


def test_totals_keep_their_bits_through_json(config):
  rng, run = np.random.default_rng(0), Run.of(config)
  pairs = rng.normal(size=(100, 2)).astype(np.float32)
  totals = {f"m{i}": Average(total=total, count=count) for i, (total, count) in enumerate(pairs)}
  meters = Meters(run, start_step=0, meta={})
  meters.add(1, totals)
  meta = json.loads(json.dumps(meters.to_meta()))
  resumed = Meters(run, start_step=1, meta=meta)
  assert resumed.to_meta() == meta and len(meta["totals"]) == 100
  assert meta["totals"] == {name: [float(x.total), float(x.count)] for name, x in totals.items()}


def test_every_host_has_rows_of_its_own(config):
  mesh = steps.make_mesh(*SAVED_ON)
  assert sharding.local_rows(mesh, config.batch_size) == list(range(config.batch_size))
