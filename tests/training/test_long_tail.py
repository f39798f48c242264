"""Test VL-LTR's two stages: the losses equal PyTorch's, and a step keeps the teacher and trains the right parts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from configs import places_lt
from diffdis_jax.config import Run
from diffdis_jax.config.sections import LongTail
from diffdis_jax.errors import UserError
from diffdis_jax.method import features, long_tail, losses
from diffdis_jax.method.step_noise import query_noise
from diffdis_jax.structs import LabelledBatch
from diffdis_jax.training.step import step_keys
from tests import steps, tiny_clip
from tests.models.networks import random_params, relative_error
from tests.steps import build_trainer, network_of

B, D = 8, 16
RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, 0, 2, 3, 3, 0, 4])
CLASSES = 5


def unit(*shape):
  x = RNG.standard_normal(shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


IMAGE, TEXT, THEIR_IMAGE, THEIR_TEXT = unit(4, B, D)
SCALES = (np.float32(np.log(1 / 0.07)), np.float32(5.0))  # the second exceeds what `contrastive` allows


def by_torch(scale, smoothing):
  image, text, scale = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (IMAGE, TEXT, scale))
  logits = scale.exp() * image @ text.T
  same = torch.tensor(LABELS[:, None] == LABELS[None], dtype=torch.float64)
  target = same / same.sum(dim=1, keepdim=True)
  ce = functools.partial(F.cross_entropy, label_smoothing=smoothing)
  loss = 0.5 * (ce(logits, target) + ce(logits.T, target))
  loss.backward()
  accuracy = (LABELS[logits.detach().numpy().argmax(axis=1)] == LABELS).mean()
  return loss.item(), [x.grad.numpy() for x in (image, text, scale)], accuracy


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_wise_contrast_equals_torchs_cross_entropy(scale, smoothing):
  def ours(image, text, scale):
    return long_tail.class_contrastive(image, text, scale, labels=jnp.asarray(LABELS), smoothing=smoothing)

  (loss, accuracy), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(IMAGE, TEXT, scale)
  expected, their_gradients, their_accuracy = by_torch(scale, smoothing)
  assert loss == pytest.approx(expected, rel=1e-6) and accuracy == pytest.approx(their_accuracy)
  for gradient, theirs in zip(gradients, their_gradients, strict=True):
    assert relative_error(gradient, theirs) < 1e-5


@pytest.mark.parametrize("scale", SCALES)
def test_distillation_equals_torchs_cross_entropy_with_the_teachers_softmax(scale):
  their_scale = np.float32(2.0)

  def ours(image, text, scale, teacher_image):
    return long_tail.distill(
      *(image, text, scale),
      teacher_image=teacher_image,
      teacher_text=jnp.asarray(THEIR_TEXT),
      teacher_logit_scale=jnp.asarray(their_scale),
    )

  loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(IMAGE, TEXT, scale, THEIR_IMAGE)
  image, text, torch_scale = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (IMAGE, TEXT, scale))
  student = torch_scale.exp() * image @ text.T
  teacher = np.exp(np.float64(their_scale)) * torch.tensor(THEIR_IMAGE).double() @ torch.tensor(THEIR_TEXT).double().T
  expected = 0.5 * (
    F.cross_entropy(student, teacher.softmax(dim=1)) + F.cross_entropy(student.T, teacher.T.softmax(dim=1))
  )
  expected.backward()
  assert loss == pytest.approx(expected.item(), rel=1e-6)
  for gradient, theirs in zip(gradients, (image.grad, text.grad, torch_scale.grad), strict=False):
    assert relative_error(gradient, theirs) < 1e-5
  assert not np.asarray(gradients[3]).any()


def make_config(stage: int, *, clip: bool = False, **changes):
  config = tiny_clip.get_config() if clip else steps.make_config()
  if clip:
    config.model.text_encoder.update(vocab_size=99, bos_id=steps.BOS, eos_id=steps.EOS)
  config.optim.epoch_steps, config.batch_size = 2, B
  if stage == 1:
    places_lt.first_stage(config, rate=1e-2, text=True)
  else:
    places_lt.second_stage(config, classes=CLASSES, anchors=3, visual=1e-2, language=1e-2)
  config.optim.warmup_steps = 0
  config.update_from_flattened_dict(changes)
  return config


def make_batch(config, seed=0):
  batch = steps.make_batch(config, seed)
  tokens = batch.tokens if config.objectives == ("class_contrastive",) else None
  return LabelledBatch(image=batch.image, label=LABELS.astype(np.int32), tokens=tokens)


def trainer_of(config, mesh=None):
  return steps.Trainer(config, mesh, make_batch(config))


BACKBONES = [pytest.param(clip, id=name, marks=pytest.mark.full) for name, clip in (("diffdis", False), ("clip", True))]


@pytest.fixture(scope="module", params=BACKBONES)
def first_stage(request):
  """Return a trainer with its initial parameters, and the state after two steps."""
  config = make_config(1, clip=request.param)
  trainer = trainer_of(config)
  state, metrics = trainer.run(trainer.initial(), make_batch(config), make_batch(config))
  assert 0 <= steps.means(metrics[1])["class_accuracy"] <= 1
  return trainer, jax.device_get(state)


def test_the_teacher_keeps_the_initial_parameters(first_stage):
  trainer, state = first_stage
  assert state.teacher.keys() == set(trainer.step.trainable)
  for path, value in state.teacher.items():
    np.testing.assert_array_equal(value, trainer.params[path], err_msg=path)
  moved = [path for path in trainer.step.trainable if (state.params[path] != trainer.params[path]).any()]
  assert len(moved) > 0.95 * len(trainer.step.trainable) and "logit_scale" in moved
  assert all((state.params[path] == trainer.params[path]).all() for path in state.params.keys() - state.teacher.keys())


class Loss:
  """The loss of a stage for random parameters and one batch."""

  def __init__(self, config):
    self.network, self.batch = network_of(config), make_batch(config)
    self.params = random_params(self.network.shapes, seed=0)
    self.keys = step_keys(config.seed, jnp.int32(0), jnp.int32(0))
    self._loss = steps.loss_function(self.network, Run.of(config))

  def metrics(self, teacher=None):
    """Return the metrics by name. `teacher` gives the parameters in which the teacher differs."""

    def loss(params, batch, teacher):
      return self._loss(params, {}, batch, self.keys, teacher and {**params, **teacher})[1][0]

    with jax.default_matmul_precision("highest"):
      return steps.means(jax.device_get(jax.jit(loss)(self.params, self.batch, teacher)))


@pytest.mark.parametrize("clip", [False, True], ids=["diffdis", "clip"])
def test_the_loss_of_the_first_stage_equals_one_by_hand(clip):
  """Student and teacher embed the same images, with the same noise, and the same sentences."""
  # The weight β is not one half, so that β and 1 − β differ.
  loss = Loss(make_config(1, clip=clip, **{"long_tail.distill_weight": 0.3}))
  network, batch, keys, b = loss.network, loss.batch, loss.keys, B
  theirs = {
    path: 1.1 * value for path, value in loss.params.items() if path.endswith("projection.kernel") or "norm" in path
  }
  metrics = loss.metrics(theirs | {"logit_scale": np.float32(1.5)})

  @jax.jit
  def embed(params):
    model = network.with_params(params)
    noise = jax.random.normal(keys["noise_e"], (b, network.model.query_width))
    f = features.image_features(model, jnp.asarray(batch.image), features.FeatureNoise(noise_e=noise), network=network)
    return losses.unit_norm(f), model.encode_text(jnp.asarray(batch.tokens)).e, model.logit_scale[...]

  with jax.default_matmul_precision("highest"):
    student = [torch.tensor(np.asarray(x)) for x in embed(loss.params)]
    teacher = [torch.tensor(np.asarray(x)) for x in embed({**loss.params, **theirs, "logit_scale": np.float32(1.5)})]
  logits, teacher_logits = (scale.exp() * image @ text.T for image, text, scale in (student, teacher))
  same = torch.tensor(LABELS[:, None] == LABELS[None]).float()
  target, ce = same / same.sum(1, keepdim=True), functools.partial(F.cross_entropy, label_smoothing=0.1)
  contrast = 0.5 * (ce(logits, target) + ce(logits.T, target))
  soft = teacher_logits.softmax(1), teacher_logits.T.softmax(1)
  distilled = 0.5 * (F.cross_entropy(logits, soft[0]) + F.cross_entropy(logits.T, soft[1]))
  assert metrics["loss_class_contrastive"] == pytest.approx(contrast.item(), rel=1e-5)
  assert metrics["loss_distill"] == pytest.approx(distilled.item(), rel=1e-5)
  assert metrics["loss"] == pytest.approx((0.7 * contrast + 0.3 * distilled).item(), rel=1e-5)
  assert metrics["temperature"] == pytest.approx(student[2].exp().item(), rel=1e-6)


@pytest.fixture(scope="module", params=BACKBONES)
def second_stage(request):
  """Return a trainer with its initial parameters, the state after a step, and the metrics of the step."""
  config = make_config(2, clip=request.param)
  trainer = trainer_of(config)
  state, (metrics,) = trainer.run(trainer.initial(), make_batch(config))
  return trainer, jax.device_get(state), steps.means(metrics)


def test_the_second_stage_trains_its_head_alone(second_stage):
  trainer, state, metrics = second_stage
  assert trainer.step.groups["head.fc1.kernel"] == "visual" and trainer.step.groups["head.q.kernel"] == "language"
  assert not trainer.step.abstract_state.teacher
  assert metrics["loss"] == pytest.approx(metrics["loss_visual"] + metrics["loss_language"], rel=1e-6)
  moved = {path for path, value in state.params.items() if (value != trainer.params[path]).any()}
  assert moved == {path for path in trainer.params if path.startswith("head.")} - {"head.anchors"}


def test_the_loss_of_the_second_stage_equals_one_by_hand():
  config = make_config(2)
  loss = Loss(config)
  network, batch, keys, metrics = loss.network, loss.batch, loss.keys, loss.metrics()
  section = LongTail()
  how = {field: getattr(section, field) for field in ("mixup", "cutmix", "cutmix_share")}
  mix = long_tail.draw_mix(keys["mix"], size=config.image_size, **how)

  @jax.jit
  def logits(params):
    model = network.with_params(params)
    noise = jax.random.normal(keys["noise_e"], (B, network.model.query_width))
    images = long_tail.mix_images(jnp.asarray(batch.image), mix)
    f = features.image_features(model, images, features.FeatureNoise(noise_e=noise), network=network)
    return dataclasses.asdict(model.head(f, model.logit_scale[...]))

  with jax.default_matmul_precision("highest"):
    by_branch = logits(loss.params)
  target = torch.tensor(
    np.asarray(long_tail.mix_targets(jnp.asarray(batch.label), mix, classes=CLASSES, smoothing=0.1))
  )
  for branch in ("visual", "language"):
    expected = F.cross_entropy(torch.tensor(np.asarray(by_branch[branch])), target)
    assert metrics[f"loss_{branch}"] == pytest.approx(expected.item(), rel=1e-5)


def test_inference_gives_the_heads_logits_of_unmixed_images():
  config = make_config(2)
  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=4)
  network, params = inference.network, random_params(inference.network.shapes, seed=0)
  images = steps.make_batch(config).image
  noise = query_noise(
    jax.random.key(3), num_noise_samples=1, places=jnp.arange(B), width=inference.network.model.query_width
  )[0]

  @jax.jit
  def logits(params):
    model = network.with_params(params)
    f = features.image_features(model, jnp.asarray(images), features.FeatureNoise(noise_e=noise), network=network)
    branches = model.head(f, model.logit_scale[...])
    return jnp.stack([branches.visual, branches.language], axis=1)

  with jax.default_matmul_precision("highest"):
    expected = logits(params)
  classified = inference.class_logits(params, images, seed=3)
  assert classified.shape == (B, 2, CLASSES) and relative_error(classified, expected) < 1e-5
  np.testing.assert_allclose(
    np.linalg.norm(inference.text_features(params, steps.make_batch(config).tokens), axis=1), 1
  )
  with pytest.raises(UserError, match="not trained for long_tail_head"):
    steps.make_inference(make_config(1)).class_logits(params, images, seed=3)


@pytest.mark.parametrize(
  "stage, changes, message",
  [
    (1, {"optim.accumulate": 2}, "class_contrastive takes a batch whole"),
    (1, {"data.sampling.sentences": False}, "class_contrastive needs sentences"),
    (1, {"objectives": ("discrimination",)}, "long_tail is there; it belongs to class_contrastive and long_tail_head"),
    (1, {"objectives": ("class_contrastive", "generation")}, "class_contrastive is trained alone"),
    (2, {"objectives": ("class_contrastive",)}, "model.head is there; it belongs to long_tail_head"),
    (2, {"optim.epoch_steps": 0}, "optim.epoch_steps is 0"),
  ],
)
def test_fields_that_contradict_each_other_are_refused(stage, changes, message):
  config = make_config(stage, **changes)
  with pytest.raises(UserError, match=message) as error:
    build_trainer(config, steps.make_mesh())
  assert "\n" not in str(error.value)
