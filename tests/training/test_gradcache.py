"""Test that a contrastive batch in several microbatches has the gradients and metrics of the whole batch."""

from __future__ import annotations

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
from diffdis_jax.training import optim
from diffdis_jax.training.gradcache import GradCache
from diffdis_jax.training.step import step_keys
from tests import steps, tiny_clip
from tests.models.networks import random_params, relative_error
from tests.steps import network_of

ONE, DATA, FSDP, ALL = (1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)
FROZEN_TEXT = {"optim.groups": (("^autoencoder|^text_encoder", "frozen"), (".*", "new"))}
OWN_VIEW = {"data.discrimination_view": "own"}
BESIDE_THE_PAPER = {"loss.snr_gamma": 2.0}
# Each case has its objectives (none for CLIP) and the fields of the config that it changes.
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
  """Make a config of 32 rows, so that eight devices have one row in each of four microbatches."""
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


def assert_same_gradient(gradient: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  """Compare with a tolerance of 1e-5, except for the biases of k, whose gradients softmax cancels up to rounding."""
  assert gradient.keys() == expected.keys()
  for path, value in expected.items():
    if not path.endswith("k.bias"):
      assert relative_error(gradient[path], value) < 1e-5, path


def check(case: str, n: int, *shape: int) -> None:
  expected, expected_metrics = problem(case).expected
  gradient, metrics = problem(case).in_microbatches(n, *shape)
  assert_same_gradient(gradient, expected)
  assert metrics.keys() == expected_metrics.keys()
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


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


def clip_step(n: int, **changes: Any) -> tuple[dict[str, np.ndarray], dict[str, float], str]:
  """Take a step of CLIP on eight devices; return the gradient that AdamW gets, the metrics and the program's text."""
  # With b1 = 0, the first moment is the newest gradient.
  changes = {"optim.accumulate": n, "optim.b1": 0.0, "optim.clip_norm": 0.01, **changes}
  trainer = steps.Trainer(make_config("clip", **changes), steps.make_mesh(*FSDP))
  state, (metrics,) = trainer.run(trainer.initial(), steps.make_batch(trainer.config))
  moments = jax.device_get(steps.moments(state.opt_state, "mu"))
  return moments, steps.means(metrics), trainer.text


@pytest.fixture(scope="module")
def in_four() -> tuple[dict[str, np.ndarray], dict[str, float], str]:
  return clip_step(4)


def test_the_gradient_is_clipped_by_the_norm_of_the_whole_batch(in_four):
  """The gradient of logit_scale counts once; counted four times, it would change the norm."""
  expected, metrics, _ = clip_step(1)
  gradient, own_metrics, _ = in_four
  assert_same_gradient(gradient, expected)
  for name, value in metrics.items():
    assert own_metrics[name] == pytest.approx(value, rel=1e-5), name
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in gradient.values()))
  assert norm == pytest.approx(0.01, rel=1e-4) and metrics["grad_norm"] > 0.1
  assert abs(gradient["logit_scale"]) > 0.01 * norm


def test_contrasting_each_microbatch_alone_is_another_loss(in_four):
  gradient, metrics, _ = in_four
  others, other_metrics, _ = clip_step(4, **{"optim.contrastive_batch": "microbatch"})
  # A row then has 8 candidates instead of 32.
  assert other_metrics["loss_contrastive"] < metrics["loss_contrastive"] - 0.5
  difference = np.sqrt(sum(np.sum(np.square(others[path] - x)) for path, x in gradient.items()))
  assert difference > 0.1 * 0.01  # each gradient is clipped to the norm 0.01


def in_loops(text: str) -> set[str]:
  """Return the names of all computations that run inside a loop, at any depth."""
  called = {}
  for block in re.split(r"\n(?=%|ENTRY)", text):
    name = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block)
    if name:
      called[name[1]] = set(re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)", block))
  looped, new = set(), set(re.findall(r"body=%?([\w.\-]+)", text))
  while new:
    looped |= new
    new = {inner for name in new for inner in called.get(name, ())} - looped
  return looped


def test_gradients_are_reduced_over_devices_once_after_the_loops(in_four):
  _, _, text = in_four
  loops = in_loops(text)
  assert len(loops) > 2
  blocks = re.split(r"\n(?=%|ENTRY)", text)
  name = lambda block: re.match(r"(?:ENTRY )?%?([\w.\-]+)", block)[1]
  assert not [collective for block in blocks if name(block) in loops for collective in hlo.collectives(block)]
