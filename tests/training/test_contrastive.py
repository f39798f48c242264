"""Compare CLIP's loss, gradients and five AdamW steps with open_clip's in PyTorch, for tiny towers in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip_train.scheduler import cosine_lr

from diffdis_jax.config import Run
from diffdis_jax.config.sections import Loss, Optim
from diffdis_jax.errors import UserError
from diffdis_jax.method import encode
from diffdis_jax.models.clip import normalise
from diffdis_jax.structs import Batch
from diffdis_jax.training import losses as objectives
from diffdis_jax.training import optim
from tests import steps, tiny_clip
from tests.models import open_clip_twin
from tests.models.from_torch import nchw, randomise
from tests.models.networks import relative_error
from tests.steps import build_trainer, network_of

STEPS = 5
MAX_LOGIT_SCALE = np.log(100.0)


def make_config(**changes: Any) -> ConfigDict:
  config = tiny_clip.get_config("recipe=openclip")
  config.model.text_encoder.update(vocab_size=99, bos_id=steps.BOS, eos_id=steps.EOS)
  config.optim.update(warmup_steps=0)
  config.num_steps = STEPS
  config.update_from_flattened_dict(changes)
  return config


def make_theirs(config: ConfigDict, *, logit_scale: float = 2.0) -> CLIP:
  theirs = randomise(open_clip_twin.make(config.model), seed=0)
  with torch.no_grad():
    theirs.logit_scale.fill_(logit_scale)
  return theirs


def their_loss(theirs: CLIP, batch: Batch) -> torch.Tensor:
  pixels = nchw(np.asarray(normalise(jnp.asarray(batch.image))))
  image = theirs.encode_image(pixels, normalize=True)
  text = theirs.encode_text(torch.from_numpy(np.asarray(batch.tokens)).long(), normalize=True)
  return ClipLoss()(image, text, theirs.logit_scale.exp())


def their_optimizer(theirs: CLIP, config: ConfigDict) -> torch.optim.AdamW:
  """Make PyTorch's AdamW with parameters grouped by open_clip's rule."""
  without = theirs.no_weight_decay()
  assert without == {"positional_embedding", "visual.positional_embedding", "visual.class_embedding"}
  decays = lambda name, parameter: parameter.ndim > 1 and name not in without
  parameters = dict(theirs.named_parameters())
  groups = [
    {"params": [x for name, x in parameters.items() if decays(name, x)], "weight_decay": config.optim.weight_decay},
    {"params": [x for name, x in parameters.items() if not decays(name, x)], "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(groups, betas=(config.optim.b1, config.optim.b2), eps=config.optim.eps)


def largest_error(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
  assert ours.keys() == theirs.keys()
  return max(relative_error(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def trainer() -> steps.Trainer:
  return steps.Trainer(make_config())


@pytest.mark.parametrize("remat", ["none", "full"])
def test_loss_and_gradients_equal_open_clips(remat):
  config = make_config(**{"model.remat": remat})
  theirs = make_theirs(config)
  params, batch = open_clip_twin.to_ours(dict(theirs.named_parameters())), steps.make_batch(config)
  total = steps.loss_function(network_of(config), Run.of(config))
  value_and_grad = jax.value_and_grad(lambda params, batch: total(params, {}, batch, {}), has_aux=True)
  lowered = jax.jit(value_and_grad).lower(params, jax.tree.map(jnp.asarray, batch))
  assert ("optimization_barrier" in lowered.as_text()) == (remat == "full")  # a barrier surrounds each recomputed part
  (value, (metrics, _)), gradients = lowered.compile()(params, batch)
  expected = their_loss(theirs, batch)
  expected.backward()
  assert relative_error(value, expected.item()) < 1e-5
  # Compare q, k and v as one array, as in open_clip: softmax cancels the gradient of k's bias up to rounding.
  their_gradients = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
  assert largest_error(open_clip_twin.to_theirs(gradients), their_gradients) < 1e-4
  means = steps.means(metrics)
  assert means["loss"] == means["loss_contrastive"] == pytest.approx(float(value))
  assert means["temperature"] == pytest.approx(np.exp(2.0))
  assert 0.0 <= means["alignment_accuracy"] <= 1.0


@pytest.mark.parametrize("logit_scale", [2.0, MAX_LOGIT_SCALE, 1e-4])
def test_parameters_after_five_steps_equal_those_of_torch(trainer, logit_scale):
  config = trainer.config
  theirs = make_theirs(config, logit_scale=logit_scale)
  trainer.params = open_clip_twin.to_ours(dict(theirs.named_parameters()))
  batches = [steps.make_batch(config, seed) for seed in range(STEPS)]
  state, metrics = trainer.run(trainer.initial(), *batches)
  optimizer = their_optimizer(theirs, config)
  for i, batch in enumerate(batches):
    for group in optimizer.param_groups:
      group["lr"] = 0.5 * (1 + np.cos(np.pi * i / STEPS)) * config.optim.rates.new
    optimizer.zero_grad()
    loss = their_loss(theirs, batch)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      theirs.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    assert relative_error(steps.means(metrics[i])["loss"], loss.item()) < 1e-4
  params, expected = jax.device_get(state.params), open_clip_twin.to_ours(dict(theirs.named_parameters()))
  # The gradient of k's biases is mere rounding, which Adam scales up.
  learned = lambda params: {path: x for path, x in params.items() if not path.endswith(("k.bias", "logit_scale"))}
  assert largest_error(learned(params), learned(expected)) < 1e-4
  assert float(params["logit_scale"]) == pytest.approx(theirs.logit_scale.item(), rel=1e-4)
  assert 0.0 <= params["logit_scale"] <= np.float32(MAX_LOGIT_SCALE)
  assert state.ema == {}  # the baseline keeps no average


def test_equal_captions_are_negatives_or_masked():
  """The last two captions of the batch are equal."""
  config = make_config()
  params = open_clip_twin.to_ours(dict(make_theirs(config).named_parameters()))
  batch, params = jax.tree.map(jnp.asarray, (steps.make_batch(config), params))
  model = network_of(config).with_params(params)
  pairs = jax.jit(lambda batch: encode.encode_pairs(model, batch))(batch)
  logits = np.exp(2.0) * np.asarray(pairs.image, np.float64) @ np.asarray(pairs.text, np.float64).T
  for equal, compared in (("negatives", logits), ("mask", logits.copy())):
    if equal == "mask":
      compared[-1, -2] = compared[-2, -1] = -np.inf
    own = np.diag(logits)
    expected = np.mean([np.log(np.exp(compared).sum(axis)) - own for axis in (0, 1)])
    section = Loss(**{**config.loss, "duplicate_captions": equal})
    captions = objectives.captions_of(section, batch.tokens)
    loss, _ = objectives.contrastive_loss(pairs, jnp.float32(2.0), captions=captions)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert not np.isclose(np.exp(logits[-1, -2]), 0)


def test_the_warmup_is_one_step_behind_open_clips():
  """open_clip's learning rate begins at peak / warmup and ours at 0. The decay is the same."""
  peak, warmup, total = 1e-3, 4, 20
  optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
  section = Optim(rates=dict(new=peak), schedule_kind="cosine", warmup_steps=warmup)
  ours = optim.rate_schedule(section, "new", num_steps=total)
  theirs = cosine_lr(optimizer, peak, warmup, total)
  rates = []
  for step in range(total):
    theirs(step)
    rates.append(optimizer.param_groups[0]["lr"])
  np.testing.assert_allclose([ours(step) for step in range(1, warmup + 1)], rates[:warmup], rtol=1e-5)
  np.testing.assert_allclose([ours(step) for step in range(warmup, total)], rates[warmup:], rtol=1e-4)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"objectives": ("contrastive", "generation")}, "contrastive is trained alone"),
    ({"model.text_encoder.projection": 16}, "model.text_encoder.projection is 16 and vision_encoder.projection 12"),
    ({"model.vision_encoder.patch": 5}, "model.vision_encoder.image_size has 16; it must be a multiple of patch=5"),
    ({"image_size": 18}, "image_size is 18; patches of 4 px do not tile it, so it must be a multiple of 4, such as 16"),
    ({"data.max_length": 9}, "data.max_length is 9; it must be from 2 to model.text_encoder.max_length, 8"),
    ({"data.discrimination_view": "own"}, "objective contrastive has one view of an image"),
    ({"objectives": ("generation",)}, "model has a vision_encoder, which is CLIP's"),
  ],
)
def test_a_config_that_is_no_clip_is_refused(changes, message):
  with pytest.raises(UserError, match=message) as error:
    build_trainer(make_config(**changes), steps.make_mesh())
  assert "\n" not in str(error.value)
