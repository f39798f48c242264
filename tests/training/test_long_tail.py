"""The two stages' losses against torch, and in the step: the teacher, the noise, what is trained."""

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
from diffdis_jax.parallel import sharding
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
SCALES = (np.float32(np.log(1 / 0.07)), np.float32(5.0))  # the second is beyond what `contrastive` allows


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
  image, text, of_scale = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (IMAGE, TEXT, scale))
  student = of_scale.exp() * image @ text.T
  teacher = np.exp(np.float64(their_scale)) * torch.tensor(THEIR_IMAGE).double() @ torch.tensor(THEIR_TEXT).double().T
  expected = 0.5 * (
    F.cross_entropy(student, teacher.softmax(dim=1)) + F.cross_entropy(student.T, teacher.T.softmax(dim=1))
  )
  expected.backward()
  assert loss == pytest.approx(expected.item(), rel=1e-6)
  for gradient, theirs in zip(gradients, (image.grad, text.grad, of_scale.grad), strict=False):
    assert relative_error(gradient, theirs) < 1e-5
  assert not np.asarray(gradients[3]).any()


def test_rows_on_eight_devices_give_the_same_losses():
  mesh = steps.make_mesh(data=4, fsdp=2)

  def ours(image, text, labels):
    contrast, _ = long_tail.class_contrastive(image, text, jnp.float32(2.6), labels=labels, smoothing=0.1)
    theirs = dict(teacher_image=text, teacher_text=image, teacher_logit_scale=jnp.float32(1.0))
    return contrast, long_tail.distill(image, text, jnp.float32(2.6), **theirs)

  alone = jax.jit(ours)(IMAGE, TEXT, LABELS.astype(np.int32))
  rows = sharding.to_global(dict(image=IMAGE, text=TEXT, labels=LABELS.astype(np.int32)), mesh)
  together = jax.jit(sharding.tracing(mesh, matmul_precision="highest")(ours))(*rows.values())
  np.testing.assert_allclose(together, alone, rtol=1e-6)


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


class Trainer:
  """A compiled step and the state around its random parameters."""

  def __init__(self, config, mesh=None):
    self.mesh = mesh or steps.make_mesh()
    self.step = build_trainer(config, self.mesh)
    self.params = random_params(self.step.shapes, seed=0)
    place = self.step.param_shardings
    self.state = self.step.with_params(jax.device_put(self.params, place))

  def __call__(self, state, batch):
    rows = LabelledBatch(**sharding.to_global(vars(batch), self.mesh))
    state, metrics = self.step.train_step(jax.tree.map(jnp.copy, state), rows)  # it takes its memory
    return state, steps.means(jax.device_get(metrics))


BACKBONES = [pytest.param(clip, id=name, marks=pytest.mark.full) for name, clip in (("diffdis", False), ("clip", True))]


@pytest.fixture(scope="module", params=BACKBONES)
def first_stage(request):
  """(config, parameters before, state after two steps, the metrics of each)."""
  config = make_config(1, clip=request.param)
  trainer = Trainer(config)
  state, first = trainer(trainer.state, make_batch(config))
  state, second = trainer(state, make_batch(config))
  return config, trainer, jax.device_get(state), (first, second)


def test_the_teacher_stays_as_it_was_at_the_start(first_stage):
  _, trainer, state, _ = first_stage
  assert state.teacher.keys() == set(trainer.step.trainable)
  for path, value in state.teacher.items():
    np.testing.assert_array_equal(value, trainer.params[path], err_msg=path)
  moved = [path for path in trainer.step.trainable if (state.params[path] != trainer.params[path]).any()]
  assert len(moved) > 0.95 * len(trainer.step.trainable) and "logit_scale" in moved
  assert all((state.params[path] == trainer.params[path]).all() for path in state.params.keys() - state.teacher.keys())


def test_the_loss_is_half_contrast_and_half_distillation(first_stage):
  for metrics in first_stage[3]:
    halves = 0.5 * (metrics["loss_class_contrastive"] + metrics["loss_distill"])
    assert metrics["loss"] == pytest.approx(halves, rel=1e-6) and 0 <= metrics["class_accuracy"] <= 1


class Loss:
  """A stage's loss of random parameters on one batch, with nothing trained."""

  def __init__(self, config):
    self.network, self.batch = network_of(config), make_batch(config)
    self.params = random_params(self.network.shapes, seed=0)
    self.keys = step_keys(config.seed, jnp.int32(0), jnp.int32(0))
    self._loss = steps.loss_function(self.network, Run.of(config))

  def metrics(self, teacher=None):
    """By name; `teacher` has other values for some of the parameters."""

    def loss(params, batch, teacher):
      return self._loss(params, {}, batch, self.keys, teacher and {**params, **teacher})[1][0]

    with jax.default_matmul_precision("highest"):
      return steps.means(jax.device_get(jax.jit(loss)(self.params, self.batch, teacher)))


@pytest.mark.parametrize("clip", [False, True], ids=["diffdis", "clip"])
def test_the_first_stages_loss_by_hand(clip):
  """Embeddings of student and teacher by the same images, noise and sentences."""
  loss = Loss(
    make_config(1, clip=clip, **{"long_tail.distill_weight": 0.3})
  )  # not a half, in which β and 1 − β are one
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
  logits, of_teacher = (scale.exp() * image @ text.T for image, text, scale in (student, teacher))
  same = torch.tensor(LABELS[:, None] == LABELS[None]).float()
  target, ce = same / same.sum(1, keepdim=True), functools.partial(F.cross_entropy, label_smoothing=0.1)
  contrast = 0.5 * (ce(logits, target) + ce(logits.T, target))
  soft = of_teacher.softmax(1), of_teacher.T.softmax(1)
  distilled = 0.5 * (F.cross_entropy(logits, soft[0]) + F.cross_entropy(logits.T, soft[1]))
  assert metrics["loss_class_contrastive"] == pytest.approx(contrast.item(), rel=1e-5)
  assert metrics["loss_distill"] == pytest.approx(distilled.item(), rel=1e-5)
  assert metrics["loss"] == pytest.approx((0.7 * contrast + 0.3 * distilled).item(), rel=1e-5)
  assert metrics["temperature"] == pytest.approx(student[2].exp().item(), rel=1e-6)


def test_an_images_feature_is_what_inference_embeds():
  config = make_config(1)
  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=4)
  network, params = inference.network, random_params(inference.network.shapes, seed=0)
  images = steps.make_batch(config).image
  embedded = inference.embed_images(params, images, seed=3)
  noise = query_noise(
    jax.random.key(3), num_noise_samples=1, places=jnp.arange(B), width=inference.network.model.query_width
  )[0]

  @jax.jit
  def feature(params):
    given = features.FeatureNoise(noise_e=noise)
    return features.image_features(network.with_params(params), jnp.asarray(images), given, network=network)

  with jax.default_matmul_precision("highest"):
    found = feature(params)
  assert np.ptp(np.linalg.norm(found, axis=1)) > 0.01  # as it is, of any length
  np.testing.assert_allclose(losses.unit_norm(found), embedded, atol=1e-5)


@pytest.fixture(scope="module", params=BACKBONES)
def second_stage(request):
  """(config, parameters before, state after a step, its metrics)."""
  config = make_config(2, clip=request.param)
  trainer = Trainer(config)
  state, metrics = trainer(trainer.state, make_batch(config))
  return config, trainer, jax.device_get(state), metrics


def test_the_second_stage_trains_its_head_alone(second_stage):
  _, trainer, state, metrics = second_stage
  assert trainer.step.groups["head.fc1.kernel"] == "visual" and trainer.step.groups["head.q.kernel"] == "language"
  assert not trainer.step.abstract_state.teacher
  assert metrics["loss"] == pytest.approx(metrics["loss_visual"] + metrics["loss_language"], rel=1e-6)
  moved = {path for path, value in state.params.items() if (value != trainer.params[path]).any()}
  assert moved == {path for path in trainer.params if path.startswith("head.")} - {"head.anchors"}


def test_the_second_stages_loss_by_hand():
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
    found = logits(loss.params)
  target = torch.tensor(
    np.asarray(long_tail.mix_targets(jnp.asarray(batch.label), mix, classes=CLASSES, smoothing=0.1))
  )
  for branch in ("visual", "language"):
    expected = F.cross_entropy(torch.tensor(np.asarray(found[branch])), target)
    assert metrics[f"loss_{branch}"] == pytest.approx(expected.item(), rel=1e-5)


def test_inference_gives_the_heads_logits_on_images_as_they_are():
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
    found = model.head(f, model.logit_scale[...])
    return jnp.stack([found.visual, found.language], axis=1)

  with jax.default_matmul_precision("highest"):
    expected = logits(params)
  found = inference.class_logits(params, images, seed=3)
  assert found.shape == (B, 2, CLASSES) and relative_error(found, expected) < 1e-5
  np.testing.assert_allclose(
    np.linalg.norm(inference.text_features(params, steps.make_batch(config).tokens), axis=1), 1
  )
  with pytest.raises(UserError, match="not trained for long_tail_head"):
    steps.make_inference(make_config(1)).class_logits(params, images, seed=3)


def test_a_clips_sentences_have_any_length_in_the_head():
  config = make_config(2, clip=True)
  inference = steps.make_inference(config, mesh=steps.make_mesh())
  params, tokens = random_params(inference.shapes, seed=0), steps.make_batch(config).tokens
  features, queries = inference.text_features(params, tokens), inference.embed_texts(params, tokens)
  lengths = np.linalg.norm(features, axis=1, keepdims=True)
  assert np.ptp(lengths) > 0.01
  np.testing.assert_allclose(features / lengths, queries, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_eight_devices_do_what_one_does(stage):
  config = make_config(stage)
  alone, many = Trainer(config), Trainer(config, steps.make_mesh(data=2, fsdp=2, tensor=2))
  batch = make_batch(config)
  (_, first), (_, second) = (trainer(trainer.state, batch) for trainer in (alone, many))
  for name in ("loss", "grad_norm"):
    assert second[name] == pytest.approx(first[name], rel=1e-4)


@pytest.mark.slow
def test_the_head_stays_in_f32_where_the_network_is_split_and_in_bfloat16():
  config = make_config(2, clip=True, **{"model.dtype": "bfloat16"})
  batch = make_batch(config)
  alone, many = Trainer(config), Trainer(config, steps.make_mesh(fsdp=2))
  (_, first), (_, second) = (trainer(trainer.state, batch) for trainer in (alone, many))
  assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)


@pytest.mark.parametrize(
  "stage, changes, message",
  [
    (1, {"optim.accumulate": 2}, "class_contrastive takes a batch whole"),
    (1, {"long_tail.label_smoothing": 1.0}, "long_tail.label_smoothing is 1.0"),
    (1, {"data.sampling.sentences": False}, "class_contrastive needs sentences"),
    (1, {"objectives": ("discrimination",)}, "long_tail is there; it belongs to class_contrastive and long_tail_head"),
    (1, {"objectives": ("class_contrastive", "generation")}, "class_contrastive is trained alone"),
    (2, {"model.head.classes": 1}, "model.head.classes is 1"),
    (2, {"objectives": ("class_contrastive",)}, "model.head is there; it belongs to long_tail_head"),
    (2, {"optim.epoch_steps": 0}, "optim.epoch_steps is 0"),
  ],
)
def test_fields_that_do_not_go_together(stage, changes, message):
  config = make_config(stage, **changes)
  with pytest.raises(UserError, match=message) as error:
    build_trainer(config, steps.make_mesh())
  assert "\n" not in str(error.value)


def test_a_long_tailed_objective_needs_its_section():
  config = steps.make_config()
  config.objectives = ("class_contrastive",)
  with pytest.raises(UserError, match="long_tail is missing"):
    build_trainer(config, steps.make_mesh())
