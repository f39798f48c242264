"""One contrastive batch in several microbatches against the same batch at once: gradients and metrics."""

from __future__ import annotations

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffdis_jax.config import Run
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import hlo
from diffdis_jax.training import gradcache, optim
from diffdis_jax.training.gradcache import GradCache
from diffdis_jax.training.step import step_keys
from tests import steps, tiny_clip
from tests.models.networks import random_params, relative_error
from tests.steps import network_of

ONE, DATA, FSDP, ALL = (1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)
FROZEN_TEXT = {"optim.groups": (("^autoencoder|^text_encoder", "frozen"), (".*", "new"))}
OWN_VIEW = {"data.discrimination_view": "own"}
BESIDE_THE_PAPER = {"loss.snr_gamma": 2.0}
# What is trained -> the config's objectives, none of which is CLIP, and its changes.
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
  "clip": ((), {}),
  "joint": (("generation", "discrimination"), {}),
  "joint, text frozen": (("generation", "discrimination"), FROZEN_TEXT),
  "joint, own view": (("generation", "discrimination"), FROZEN_TEXT | OWN_VIEW),
  "joint, noise": (("generation", "discrimination"), {"text_diffusion.target": "noise", "sample_posterior": False}),
  "joint, beside the paper": (("generation", "discrimination"), FROZEN_TEXT | BESIDE_THE_PAPER),
  "discrimination": (("discrimination",), {}),
  "discrimination, text frozen": (("discrimination",), FROZEN_TEXT),
  "generation": (("generation",), FROZEN_TEXT),
}


def make_config(case: str, **changes: Any) -> ConfigDict:
  """32 rows, of which eight devices have one in each of four microbatches."""
  names, more = CASES[case]
  changes = {"batch_size": 32, **more, **changes}
  if not names:
    config = tiny_clip.get_config()
    config.model.text_encoder.update(vocab_size=99, bos_id=steps.BOS, eos_id=steps.EOS, depth=1)
    config.model.vision_encoder.depth = 1
    config.update_from_flattened_dict(changes)
    return config
  dropout = {"loss.condition_dropout": 0.3, "loss.image_dropout": 0.3, "loss.ita_weight": 0.5}
  return steps.make_config(*names, **{**dropout, **changes})


class Problem:
  """A batch, random parameters, and the gradient of the whole batch at once."""

  def __init__(self, case: str):
    config = make_config(case)
    self.network = network_of(config)
    self.run = Run.of(config)
    groups = optim.groups_of(self.network.shapes, config.optim.groups)
    params = random_params(self.network.shapes, seed=0)
    parts = [{k: x for k, x in params.items() if (groups[k] == optim.FROZEN) == frozen} for frozen in (False, True)]
    batch = steps.make_batch(config)
    if config.data.discrimination_view == "own":
      batch = batch.replace(discrimination_image=steps.make_batch(config, seed=1).image)
    self._arguments = jax.tree.map(jnp.asarray, (*parts, batch))
    self._keys = step_keys(0, jnp.int32(0), jnp.int32(0))

  def _run(self, f: Any, mesh: jax.sharding.Mesh) -> Any:
    trainable, fixed, batch = self._arguments
    stored = lambda params: sharding.shardings(params, mesh, self.network.shapes)
    placed = jax.device_put((trainable, fixed), (stored(trainable), stored(fixed)))
    on_mesh = sharding.tracing(mesh, matmul_precision="highest")(f)
    compiled = jax.jit(on_mesh)
    arguments = *placed, jax.device_put(batch, sharding.batch_sharding(mesh)), self._keys
    return jax.device_get(compiled(*arguments))

  @functools.cached_property
  def expected(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    loss = jax.grad(steps.loss_function(self.network, self.run), has_aux=True)
    gradient, (metrics, _) = self._run(loss, steps.make_mesh())
    return gradient, steps.means(metrics)

  def in_microbatches(self, n: int, *shape: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    mesh = steps.make_mesh(*shape)
    gradient, metrics, _ = self._run(GradCache(self.network, self.run, mesh, n).__call__, mesh)
    return gradient, steps.means(metrics)


problem = functools.cache(Problem)


def assert_same_gradient(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  """Each to 1e-5, except for the biases of k, which softmax leaves no gradient but rounding."""
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    if not path.endswith("k.bias"):
      assert relative_error(found[path], value) < 1e-5, path


def check(case: str, n: int, *shape: int) -> None:
  (expected, metrics), (gradient, found) = problem(case).expected, problem(case).in_microbatches(n, *shape)
  assert_same_gradient(gradient, expected)
  assert found.keys() == metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  "case, n, shape",
  [
    ("clip", 2, ONE),
    ("clip", 4, FSDP),
    pytest.param("joint", 4, DATA, marks=pytest.mark.slow),
    ("joint, beside the paper", 2, ONE),
    ("discrimination, text frozen", 2, ONE),
  ],
)
def test_microbatches_have_the_gradient_and_the_metrics_of_their_batch(case, n, shape):
  check(case, n, *shape)


@pytest.mark.full
@pytest.mark.parametrize("shape", [ONE, DATA, FSDP, ALL], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_objective_number_and_mesh(case, n, shape):
  check(case, n, *shape)


@pytest.mark.slow
def test_other_noise_in_the_second_pass_is_another_gradient(monkeypatch):
  """So that the tests above would see it."""
  original = GradCache.second_pass

  def second_pass(self: GradCache, trainable: Any, fixed: Any, rows: gradcache.Microbatch, *rest: Any, **size: int):
    assert rows.noise is not None
    noise = rows.noise.replace(noise_e=-rows.noise.noise_e)
    return original(self, trainable, fixed, rows._replace(noise=noise), *rest, **size)

  monkeypatch.setattr(GradCache, "second_pass", second_pass)
  case = problem("discrimination, text frozen")
  (expected, metrics), (found, others) = case.expected, case.in_microbatches(2)
  # The loss is of the first pass, and says nothing.
  assert others["loss_discrimination"] == pytest.approx(metrics["loss_discrimination"], rel=1e-5)
  with pytest.raises(AssertionError):
    assert_same_gradient(found, expected)
  assert relative_error(found["alignment.predictor.kernel"], expected["alignment.predictor.kernel"]) > 0.1


def trained(n: int, **changes: Any) -> tuple[dict[str, np.ndarray], dict[str, float], str]:
  """CLIP's gradient as AdamW got it, its metrics, and the program's text, of a step on eight devices."""
  # With b1 = 0, the first moment is the newest gradient.
  changes = {"optim.accumulate": n, "optim.b1": 0.0, "optim.clip_norm": 0.01, **changes}
  trainer = steps.Trainer(make_config("clip", **changes), steps.make_mesh(*FSDP))
  state, (metrics,) = trainer.run(trainer.initial(), steps.make_batch(trainer.config))
  moments = jax.device_get(steps.moments(state.opt_state, "mu"))
  return moments, steps.means(metrics), trainer.text


@pytest.fixture(scope="module")
def in_four() -> tuple[dict[str, np.ndarray], dict[str, float], str]:
  return trained(4)


def test_clipping_sees_the_norm_of_the_whole_batch(in_four):
  """And the gradient of logit_scale once: four times it is another norm."""
  expected, metrics, _ = trained(1)
  gradient, found, _ = in_four
  assert_same_gradient(gradient, expected)
  for name, value in metrics.items():
    assert found[name] == pytest.approx(value, rel=1e-5), name
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in gradient.values()))
  assert norm == pytest.approx(0.01, rel=1e-4) and metrics["grad_norm"] > 0.1
  assert abs(gradient["logit_scale"]) > 0.01 * norm


def test_a_contrastive_batch_a_microbatch_is_another_loss(in_four):
  gradient, metrics, _ = in_four
  others, found, _ = trained(4, **{"optim.contrastive_batch": "microbatch"})
  # Of 8 rows instead of 32.
  assert found["loss_contrastive"] < metrics["loss_contrastive"] - 0.5
  difference = np.sqrt(sum(np.sum(np.square(others[path] - x)) for path, x in gradient.items()))
  assert difference > 0.1 * 0.01  # the norm of each


def in_loops(text: str) -> set[str]:
  """Names of the computations that a loop runs, at any depth."""
  called = {}
  for block in re.split(r"\n(?=%|ENTRY)", text):
    name = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block)
    if name:
      called[name[1]] = set(re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)", block))
  found, new = set(), set(re.findall(r"body=%?([\w.\-]+)", text))
  while new:
    found |= new
    new = {inner for name in new for inner in called.get(name, ())} - found
  return found


def test_gradients_are_reduced_over_devices_once_after_the_loops(in_four):
  _, _, text = in_four
  loops = in_loops(text)
  assert len(loops) > 2
  blocks = re.split(r"\n(?=%|ENTRY)", text)
  name = lambda block: re.match(r"(?:ENTRY )?%?([\w.\-]+)", block)[1]
  inside = [each for block in blocks if name(block) in loops for each in hlo.collectives(block)]
  assert not inside
  # Each parameter's gradient once; beside them numbers, and the cache of both sides of the loss.
  shapes, mesh = network_of(make_config("clip")).shapes, steps.make_mesh(*FSDP)
  local = lambda path, shape: sharding.shardings({path: shapes[path]}, mesh, shapes)[path].shard_shape(shape)
  expected = collections.Counter(local(path, leaf.shape) for path, leaf in shapes.items())
  found = {kind: collections.Counter() for kind in ("all-gather", "all-reduce", "reduce-scatter")}
  for each in hlo.collectives(text):
    found[each.kind].update(each.shapes)
  others = found["all-reduce"] + found["reduce-scatter"] - expected
  assert expected <= found["all-reduce"] + found["reduce-scatter"] and others.keys() == {(), (32, 12)}, others
  assert others[32, 12] == 2
  # And each that is split is made whole once, for both passes.
  split = [path for path, leaf in shapes.items() if local(path, leaf.shape) != leaf.shape]
  assert found["reduce-scatter"].total() == len(split) > 10
  whole = collections.Counter(shapes[path].shape for path in split)
  assert (found["all-gather"] - whole).keys() == {(32, 2), (32, 12)}
