"""Test the cosine and norms of the two tasks' gradients against float64 and the whole loss at two values of λ."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from diffdis_jax.parallel import sharding
from diffdis_jax.structs import Batch
from replication import gradient_meter
from tests import steps
from tests.models.networks import random_params

pytestmark = pytest.mark.slow

# A block has the parameters whose paths begin so.
BLOCKS = {
  "down": ("unet.conv_in.", "unet.down."),
  "middle": ("unet.middle.",),
  "text_encoder": ("text_encoder.",),
  "shared": ("unet.conv_in.", "unet.down.", "unet.middle.", "unet.time.", "text_encoder."),
  "up": ("unet.up.", "unet.norm_out.", "unet.conv_out."),
  "fusion": ("text_stream.",),
}
DROPOUT = {"loss.condition_dropout": 0.3, "loss.image_dropout": 0.3, "batch_size": 16}


def make_config(**changes):
  return steps.make_config(**{**DROPOUT, **changes})


@functools.cache
def expected() -> dict[str, float]:
  """Compute the figures from the gradient of L = L_IG + λ L_ITA, which is linear in λ, at 0 and at 1."""
  gradients = []
  for ita_weight in (0.0, 1.0):
    config = make_config(**{"loss.ita_weight": ita_weight})
    loss = steps.Loss(config, trained=r"^(?!autoencoder|text_encoder\.tokens)")  # the others are frozen
    _, gradient = loss.value_and_grad(steps.make_batch(config))
    gradients.append({path: value.astype(np.float64) for path, value in gradient.items()})
  of_ig, both = gradients
  of_ita = {path: both[path] - value for path, value in of_ig.items()}
  figures = {}
  for block, starts in BLOCKS.items():
    paths = [path for path in both if path.startswith(starts)]
    a, b = (np.concatenate([gradient[path].ravel() for path in paths]) for gradient in (of_ig, of_ita))
    norms = {"generation": np.linalg.norm(a), "discrimination": np.linalg.norm(b)}
    reached = {"up": ("generation",), "fusion": ("discrimination",)}.get(block, tuple(norms))
    figures |= {f"grad_norm_{task}_{block}": norms[task] for task in reached}
    if len(reached) == 2:
      figures[f"grad_cosine_{block}"] = a @ b / np.prod([*norms.values()])
      figures[f"grad_ratio_{block}"] = norms["discrimination"] / norms["generation"]
    else:
      (other,) = norms.keys() - {*reached}
      assert norms[other] < 1e-4 * norms[reached[0]]
  return figures


@pytest.mark.parametrize(
  "changes, mesh",
  [
    ({"loss.ita_weight": 0.01}, (1, 1, 1)),
    ({"optim.accumulate": 2}, (2, 2, 1)),
  ],
)
def test_cosines_and_norms_equal_those_of_the_whole_loss_in_float64(changes, mesh):
  """This holds for any λ, without other terms of the loss, in microbatches by GradCache, and over devices."""
  config = make_config(**changes)
  trainer = steps.build_trainer(config, steps.make_mesh(*mesh))
  params = jax.device_put(random_params(trainer.shapes, seed=0), trainer.param_shardings)
  batch = Batch(**sharding.to_global(vars(steps.make_batch(config)), trainer.mesh))
  compare = gradient_meter.compiled(trainer)
  state = trainer.with_params(params)
  found = jax.device_get(compare(state, batch))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, batch)))  # the step has them next
  assert found.keys() == expected().keys()
  for name, value in expected().items():
    np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-5 if "cosine" in name else 0, err_msg=name)
