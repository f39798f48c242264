from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.method import joint
from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.step_noise import sample_noise
from diffdis_jax.models.autoencoder import sample_posterior
from diffdis_jax.structs import Batch, DiscriminationPass, GenerationPass, LatentBatch, TrainState
from diffdis_jax.training import losses as objectives
from diffdis_jax.training import step
from tests import steps
from tests.steps import build_trainer

T = steps.NUM_TIMESTEPS


def spy(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
  """Record the inputs and the output of both passes from now on, and return them by the name of the pass."""
  calls: dict[str, dict[str, Any]] = {}

  def recording(name: str, original: Callable) -> Callable:
    def call(self: DiffDis, **inputs: Any) -> Any:
      calls[name] = {**inputs, "output": original(self, **inputs)}
      return calls[name]["output"]

    return call

  original = joint.both_passes

  def both_passes(model: DiffDis, *passes: GenerationPass | DiscriminationPass, **settings: int) -> Any:
    outputs = original(model, *passes, **settings)
    predictions = outputs.noise_z, outputs.prediction_e
    for name, inputs, output in zip(("generation", "discrimination"), passes, predictions, strict=True):
      calls[name] = {**vars(inputs), "output": output}
    return outputs

  monkeypatch.setattr(joint, "both_passes", both_passes)
  monkeypatch.setattr(DiffDis, "generation", recording("generation", DiffDis.generation))
  monkeypatch.setattr(DiffDis, "discrimination", recording("discrimination", DiffDis.discrimination))
  return calls


def info_nce(
  query: np.ndarray, e: np.ndarray, scale: float, tokens: np.ndarray, dropped: np.ndarray
) -> tuple[float, np.ndarray]:
  """Compute the loss, and the mean of both directions for each row with an image, in float64 with loops."""
  query = query / np.linalg.norm(query, axis=1, keepdims=True)
  logits = min(np.exp(scale), 100.0) * query @ e.T
  b = len(e)
  is_compared = lambda i, j: i == j or (tokens[i] != tokens[j]).any()
  to_text = [-logits[i, i] + np.log(sum(np.exp(logits[i, j]) for j in range(b) if is_compared(i, j))) for i in range(b)]
  kept = [j for j in range(b) if not dropped[j]]
  to_image = [-logits[j, j] + np.log(sum(np.exp(logits[i, j]) for i in kept if is_compared(i, j))) for j in kept]
  return (np.mean(to_text) + np.mean(to_image)) / 2, (np.array(to_text)[kept] + np.array(to_image)) / 2


VARIANTS = {
  "data": {"loss.condition_dropout": 0.3, "loss.image_dropout": 0.3, "model.unet.attention": (True,)},
  "noise": {
    "text_diffusion.target": "noise",
    "text_diffusion.schedule": "cosine",
    "text_diffusion.gamma": 0.5,
    "image_diffusion.schedule": "linear",
    "loss.ita_weight": 0.25,
    "loss.condition_dropout": 0.0,
    "loss.image_dropout": 0.0,
    "condition_timestep": 0,
    "sample_posterior": False,
  },
  # The paper has no weighting by the signal-to-noise ratio.
  "beside the paper": {"loss.snr_gamma": 2.0, "loss.image_dropout": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_joint_loss_is_the_equations_on_the_same_keys(monkeypatch, variant):
  config = steps.make_config(**VARIANTS[variant])
  loss, batch, keys = steps.Loss(config), steps.make_batch(config), steps.make_keys()
  calls = spy(monkeypatch)

  def everything(params, batch, keys):
    model = loss.network.with_params(params)
    z = model.encode_image(batch.image, keys["posterior"] if config.sample_posterior else None)
    empty = jnp.asarray([[steps.BOS] + [steps.EOS] * (batch.tokens.shape[1] - 1)])
    return loss(params, batch, keys), dict(calls), z, model.encode_text(batch.tokens), model.encode_text(empty).c

  results = jax.device_get(jax.jit(everything)(loss.params, batch, keys))
  ((total, metrics), passes, z, text, null) = jax.tree.map(lambda x: x.astype(np.float64), results)
  means = steps.means(metrics)
  b = len(z)

  draw_t = lambda name: np.asarray(jax.random.randint(keys[name], (b,), 0, T))
  t_z, t_e = draw_t("t_z"), draw_t("t_e")
  no_condition = np.asarray(jax.random.bernoulli(keys["drop_condition"], config.loss.condition_dropout, (b, 1, 1)))
  no_image = np.asarray(jax.random.bernoulli(keys["drop_image"], config.loss.image_dropout, (b,)))
  beside = variant == "beside the paper"
  assert no_image.any() == (variant != "noise") and not no_image.all()
  assert no_condition.any() == (variant == "data") or beside

  alpha_bar = steps.ALPHA_BAR[config.image_diffusion.schedule][t_z][:, None, None, None]
  noise_z = np.asarray(jax.random.normal(keys["noise_z"], z.shape), np.float64)
  generation = passes["generation"]
  np.testing.assert_array_equal(generation["t_z"], t_z)
  np.testing.assert_allclose(generation["z_t"], np.sqrt(alpha_bar) * z + np.sqrt(1 - alpha_bar) * noise_z, atol=1e-5)
  np.testing.assert_allclose(generation["c"], np.where(no_condition, null, text.c), atol=1e-5)
  by_sample = ((generation["output"] - noise_z) ** 2).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(means["loss_generation"], by_sample.mean(), rtol=1e-5)
  snr = (alpha_bar / (1 - alpha_bar)).ravel()
  weights = np.minimum(snr, config.loss.snr_gamma) / snr if config.loss.snr_gamma else np.ones(b)
  assert (weights < 0.9).any() == beside

  gamma = config.text_diffusion.gamma
  alpha_bar = steps.ALPHA_BAR[config.text_diffusion.schedule][t_e][:, None]
  noise_e = np.asarray(jax.random.normal(keys["noise_e"], text.e.shape), np.float64)
  e_t = gamma * np.sqrt(alpha_bar) * text.e + np.sqrt(1 - alpha_bar) * noise_e
  discrimination = passes["discrimination"]
  np.testing.assert_array_equal(discrimination["t_e"], t_e)
  np.testing.assert_allclose(discrimination["e_t"], e_t, atol=1e-5)
  np.testing.assert_allclose(discrimination["z"], np.where(no_image[:, None, None, None], 0, z), atol=1e-5)
  np.testing.assert_array_equal(discrimination["t_z"], np.full(b, config.condition_timestep))
  np.testing.assert_allclose(discrimination["c_null"], np.broadcast_to(null, text.c.shape), atol=1e-5)
  query = discrimination["output"]
  if config.text_diffusion.target == "noise":
    query = (e_t - np.sqrt(1 - alpha_bar) * query) / (gamma * np.sqrt(alpha_bar))
  scale = loss.params["logit_scale"].astype(np.float64)
  ita, by_pair = info_nce(query, text.e, scale, batch.tokens, no_image)
  np.testing.assert_allclose(means["loss_discrimination"], by_pair.mean(), rtol=1e-5)

  expected = (weights * by_sample).mean() + config.loss.ita_weight * ita
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  np.testing.assert_allclose(means["loss"], total, rtol=1e-6)
  for name, t, values in (("generation", t_z, by_sample), ("discrimination", t_e[~no_image], by_pair)):
    sums, counts = np.array([jax.tree.leaves(metrics[f"loss_{name}_q{i}"]) for i in (1, 2, 3, 4)]).T
    np.testing.assert_array_equal(counts, np.bincount(t // 250, minlength=4))
    np.testing.assert_allclose(sums, np.bincount(t // 250, values, minlength=4), rtol=1e-5, atol=1e-6)


def test_discrimination_reads_a_caption_only_through_e_t(monkeypatch):
  config = steps.make_config("discrimination", **{"loss.image_dropout": 0.0})
  loss, batch, keys = steps.Loss(config), steps.make_batch(config), steps.make_keys()
  calls = spy(monkeypatch)

  def inputs(params, batch, keys):
    loss(params, batch, keys)
    return dict(calls["discrimination"])

  run = jax.jit(inputs)
  before = run(loss.params, batch, keys)
  tokens = batch.tokens.copy()
  tokens[3, 1] = (tokens[3, 1] + 1) % steps.BOS
  after = run(loss.params, batch.replace(tokens=tokens), keys)
  for name in ("z", "t_z", "t_e", "c_null"):
    np.testing.assert_array_equal(after[name], before[name])
  changed = (np.asarray(after["e_t"]) != np.asarray(before["e_t"])).any(axis=1)
  np.testing.assert_array_equal(np.flatnonzero(changed), [3])


GOLDEN_KEYS = {
  "posterior": (606282574, 1201192460),
  "t_z": (3536235892, 2418354380),
  "noise_z": (3333673603, 2751763383),
  "drop_condition": (3825060772, 4017715808),
  "t_e": (2832731578, 3106893194),
  "noise_e": (814280283, 1333195700),
  "drop_image": (522268029, 110828973),
  "posterior_discrimination": (1737289153, 2762526652),
  "mix": (3319635749, 3255860998),
}


# GOLDEN_KEYS are those of seed 3, step 5, microbatch 1. With other keys, resumed runs would change.
def test_keys_depend_on_seed_step_and_microbatch_alone():
  key_data = lambda *place: {name: jax.random.key_data(key) for name, key in step.step_keys(*place).items()}
  places = [(seed, n, micro) for seed in (0, 1, 2**31) for n in (0, 1, 2) for micro in (0, 1, 2)]
  everything = [key_data(seed, jnp.int32(n), jnp.int32(micro)) for seed, n, micro in places]
  pairs = {tuple(np.asarray(key).tolist()) for keys in everything for key in keys.values()}
  assert len(pairs) == len(places) * len(step.KEYS)
  compiled = jax.jit(step.step_keys)(jnp.uint32(3), jnp.int32(5), jnp.int32(1))
  for name, key in key_data(3, jnp.int32(5), jnp.int32(1)).items():
    assert tuple(np.asarray(key).tolist()) == GOLDEN_KEYS[name], name
    np.testing.assert_array_equal(jax.random.key_data(compiled[name]), key)


def test_timesteps_of_image_and_text_are_independent_and_any_of_all():
  config = steps.make_config()
  run, network = Run.of(config), steps.network_of(config)
  tokens = np.zeros((20_000, config.data.max_length), np.int32)
  batch = Batch(image=np.zeros((len(tokens), 1, 1, 3), np.uint8), tokens=tokens)
  noise = sample_noise(steps.make_keys(), batch, network=network, loss=run.loss, sample_posterior=False)
  t_z, t_e = np.asarray(noise.t_z), np.asarray(noise.t_e)
  for t in (t_z, t_e):
    assert (t.min(), t.max()) == (0, T - 1) and abs(t.mean() - (T - 1) / 2) < 10
  assert abs(np.corrcoef(t_z, t_e)[0, 1]) < 0.08
  assert (t_z == t_e).mean() < 0.01


@pytest.mark.parametrize(
  "objective, frozen, absent",
  [
    pytest.param(
      *("generation", "^autoencoder|^text_encoder", "^(text_stream|alignment|logit_scale)"), marks=pytest.mark.slow
    ),
    ("discrimination", "^autoencoder|^text_encoder", r"^unet\.(up|norm_out|conv_out)"),
    ("reconstruction", r"^autoencoder\.(shift|scale)$", "^(unet|text_encoder|text_stream|alignment|logit_scale)"),
  ],
)
def test_one_objective_trains_its_own_parts_and_averages_them(objective, frozen, absent):
  changes = {"optim.ema_decay": 0.15, "optim.warmup_steps": 0}
  if objective != "reconstruction":
    changes["optim.groups"] = ((frozen, "frozen"), (".*", "new"))
  trainer = steps.Trainer(steps.make_config(objective, **changes))
  names = trainer.step.shapes.keys()
  assert not [name for name in names if re.search(absent, name)]
  state, batch = trainer.initial(), steps.make_batch(trainer.config)
  trained = {name for name in names if not re.search(frozen, name)}
  assert state.ema.keys() == trained
  assert steps.moments(state.opt_state, "mu").keys() == trained

  average = {name: trainer.params[name].astype(np.float64) for name in trained}
  for i in range(3):
    state, (metrics,) = trainer.run(state, batch)
    decay = min(0.15, (1 + i) / (10 + i))
    average = {name: decay * average[name] + (1 - decay) * np.asarray(state.params[name]) for name in trained}
    assert np.isfinite(steps.means(metrics)["loss"])
  assert int(state.step) == 3
  for name in names:
    same = np.asarray(state.params[name]).tobytes() == trainer.params[name].tobytes()
    assert same == bool(re.search(frozen, name) and objective != "reconstruction"), name
  for name in trained:
    np.testing.assert_allclose(state.ema[name], average[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_latent_statistics_of_microbatches_are_the_mean_of_theirs():
  config = steps.make_config("reconstruction", **{"optim.accumulate": 2})
  trainer, batch = build_trainer(config, steps.make_mesh()), jax.tree.map(jnp.asarray, steps.make_batch(config))
  params = jax.tree.map(jnp.asarray, steps.random_params(trainer.shapes, seed=0))
  state = TrainState(params=params, step=jnp.int32(0), seed=jnp.uint32(0))
  statistics = jax.jit(lambda state, batch: trainer.gradient(state, batch).statistics)(state, batch)

  loss = steps.loss_function(trainer.network, trainer.run)
  statistics_of = jax.jit(lambda batch, keys: loss(params, {}, batch, keys)[1][1])
  parts = [statistics_of(jax.tree.map(lambda x, i=i: x[i::2], batch), steps.make_keys(i)) for i in range(2)]
  assert statistics.keys() == {"autoencoder.shift", "autoencoder.scale"}
  # By hand, for the first part: the shift and the reciprocal of the scale are running averages.
  model = trainer.network.with_params(params)
  sample = jax.jit(lambda image, key: sample_posterior(model.autoencoder.encode(to_signed(image)), key))
  z = np.asarray(sample(batch.image[::2], steps.make_keys(0)["posterior"]), np.float64)
  average = lambda before, now: (
    objectives.STATISTICS_DECAY * np.asarray(before) + (1 - objectives.STATISTICS_DECAY) * now
  )
  scale = average(1 / params["autoencoder.scale"], z.std(axis=(0, 1, 2)))
  np.testing.assert_allclose(parts[0]["autoencoder.scale"], 1 / scale, rtol=1e-5)
  shift = average(params["autoencoder.shift"], z.mean(axis=(0, 1, 2)))
  np.testing.assert_allclose(parts[0]["autoencoder.shift"], shift, rtol=1e-5, atol=1e-6)
  for name, value in statistics.items():
    np.testing.assert_allclose(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-5, err_msg=name)


def test_accumulation_applies_the_mean_gradient_of_the_microbatches():
  trained, rate, eps = r"^unet\.(norm_out|conv_out)", 0.1, 1.0  # with this eps, the update is smooth in the gradient
  changes = {"optim.accumulate": 2, "optim.groups": ((trained, "new"), (".*", "frozen")), "optim.rates.new": rate}
  changes["optim.contrastive_batch"] = "microbatch"
  changes |= {"optim.eps": eps, "optim.clip_norm": 0.0, "optim.warmup_steps": 0, "optim.schedule_kind": "constant"}
  config = steps.make_config("generation", **changes)
  trainer, batch = steps.Trainer(config), steps.make_batch(config)
  state, (metrics,) = trainer.run(trainer.initial(), batch)

  loss = steps.Loss(config, trained=trained)
  gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
  parts = [gradient_of(loss.trained, jax.tree.map(lambda x, i=i: x[i::2], batch), steps.make_keys(i)) for i in range(2)]
  assert abs(parts[0][0][0] - parts[1][0][0]) > 1e-3
  gradient = jax.tree.map(lambda a, b: (a + b) / 2, *(part[1] for part in parts))
  optimizer = optax.adamw(
    rate, b2=config.optim.b2, eps=eps, weight_decay=config.optim.weight_decay, mask=lambda params: decayed(params)
  )
  decayed = lambda params: {name: not re.search(config.optim.no_decay, name) for name in params}
  with jax.numpy_dtype_promotion("standard"):
    updates, _ = optimizer.update(gradient, optimizer.init(loss.trained), loss.trained)
  for name, value in optax.apply_updates(loss.trained, updates).items():
    np.testing.assert_allclose(state.params[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.abs(np.asarray(value) - loss.trained[name]).max() > 1e-5
  means = steps.means(metrics)
  np.testing.assert_allclose(means["loss"], np.mean([part[0][0] for part in parts]), rtol=1e-5)
  np.testing.assert_allclose(means["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)


@pytest.mark.slow
def test_bf16_compute_keeps_f32_parameters_and_is_close():
  """In bfloat16 the gradient of every part points in nearly the same direction as in float32.

  A gradient with relative error r has a cosine of 1 - r²/2. bfloat16 rounds to 2^-9, and a few hundred roundings in a
  row add up to some per cent: errors of 1 to 5 % were measured. Twice that is allowed.
  """
  batch = steps.make_batch(steps.make_config())
  in_f32, in_bf16 = (
    steps.Loss(steps.make_config(**{"model.dtype": dtype}), trained="^(?!autoencoder)")
    for dtype in ("float32", "bfloat16")
  )
  assert {x.dtype for x in in_bf16.params.values()} == {np.dtype(np.float32)}
  (expected, exact), (value, gradient) = in_f32.value_and_grad(batch), in_bf16.value_and_grad(batch)
  assert value != expected
  np.testing.assert_allclose(value, expected, rtol=0.02)
  for name, x in gradient.items():
    assert x.dtype == np.float32 and np.isfinite(x).all() and x.any(), name

  parts = {".".join(name.split(".")[: 2 if name.startswith(("unet", "text_stream")) else 1]) for name in exact}
  assert {"alignment", "text_encoder", "text_stream.blocks", "unet.down", "unet.middle", "unet.up"} < parts
  for part in parts:
    names = [name for name in exact if name.startswith(part)]
    a, b = (np.concatenate([values[name].ravel() for name in names]) for values in (exact, gradient))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995, part
    assert abs(np.linalg.norm(b) / np.linalg.norm(a) - 1) < 0.05, part


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"objectives": ()}, "objectives is empty"),
    (
      {"objectives": ("discrimination",), "loss.snr_gamma": 5.0},
      "loss.snr_gamma is 5.0; it changes generation alone, which objectives lacks: leave it at 0",
    ),
    ({"objectives": ("reconstruction", "generation")}, "cannot be combined"),
    ({"objectives": ("generation", "generation")}, "objectives is generation, generation; name each once"),
    ({"optim.groups": ((".*", "frozen"),)}, "freezes every parameter"),
    ({"optim.groups": ((".*", "new"),)}, "trains the autoencoder"),
    ({"optim.groups": (("^autoencoder", "frozen"),)}, "no rule of optim.groups matches parameter"),
    ({"optim.rates": {"new": 1e-3, "old": 1e-4}, "optim.groups": (("^autoencoder", "frozen"), (".*", "nwe"))}, "nwe"),
    ({"batch_size": 15, "optim.accumulate": 2}, "batch_size is 15; .* multiple of 2, such as 1[46]"),
    ({"optim.contrastive_batch": "half"}, "optim.contrastive_batch is 'half'; it must be one of whole, microbatch"),
  ],
)
def test_wrong_configs_are_refused_before_anything_is_allocated(changes, message):
  config = steps.make_config()
  config.update_from_flattened_dict({k: v for k, v in changes.items() if k != "optim.rates"})
  if "optim.rates" in changes:
    config.optim.rates = changes["optim.rates"]
  with pytest.raises(UserError, match=message) as error:
    build_trainer(config, steps.make_mesh())
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["image", "discrimination_image"])
def test_pixels_of_another_scale_are_refused(name):
  """With pixels from 0 to 1, which other training loops use, every image would be black."""
  batch = types.SimpleNamespace(**vars(steps.make_batch(steps.make_config())))
  setattr(batch, name, batch.image.astype(np.float32) / 255)
  trainer = build_trainer(steps.make_config(), steps.make_mesh())
  with pytest.raises(UserError, match=f"the batch's {name} is float32; give uint8 pixels, 0 to 255"):
    inspect.unwrap(step.Trainer.gradient)(trainer, trainer.abstract_state, batch)


def test_discrimination_may_have_its_own_view_of_the_images(monkeypatch):
  config = steps.make_config(sample_posterior=False)
  loss, calls = steps.Loss(config), spy(monkeypatch)

  @jax.jit
  def images(batch: Batch) -> tuple[jax.Array, jax.Array]:
    loss(loss.trained, batch, steps.make_keys())
    # The noise is the same in each call, so equal z give equal z_t.
    return calls["generation"]["z_t"], calls["discrimination"]["z"]

  batch, other = steps.make_batch(config), steps.make_batch(config, seed=1)
  batches = batch, other, batch.replace(discrimination_image=other.image)
  generation, discrimination = zip(*map(images, batches), strict=True)
  np.testing.assert_array_equal(generation[2], generation[0])
  np.testing.assert_array_equal(discrimination[2], discrimination[1])
  assert np.abs(discrimination[2] - discrimination[0]).max() > 0.01


@pytest.mark.parametrize("sample", [True, False])
def test_stored_posteriors_give_the_same_inputs_as_their_images(monkeypatch, sample):
  """The network's inputs are equal up to the bfloat16 rounding of stored posteriors. Each step samples anew."""
  config = steps.make_config(sample_posterior=sample, **{"loss.image_dropout": 0.0})
  loss, calls = steps.Loss(config), spy(monkeypatch)
  batch = jax.tree.map(jnp.asarray, steps.make_batch(config))
  model = loss.network.with_params(loss.params)

  @jax.jit
  def encoded(batch: Batch) -> list[jax.Array]:
    posterior = model.autoencoder.encode(to_signed(batch.image))
    return [x.astype(jnp.bfloat16) for x in (posterior.mean, posterior.log_variance)]

  mean, log_variance = encoded(batch)
  stored = LatentBatch(mean=mean, log_variance=log_variance, tokens=batch.tokens)

  @jax.jit
  def inputs_of(batch: Batch | LatentBatch, step_number: jax.Array) -> dict[str, jax.Array]:
    loss(loss.trained, batch, step.step_keys(0, step_number, jnp.int32(0)))
    passes = {"generation": ("z_t", "t_z", "c"), "discrimination": ("z", "t_z", "e_t", "t_e", "c_null")}
    return {f"{name} {field}": calls[name][field] for name, fields in passes.items() for field in fields}

  expected, from_stored = (inputs_of(inputs, jnp.int32(0)) for inputs in (batch, stored))
  for name, value in expected.items():
    np.testing.assert_allclose(from_stored[name], value, atol=0.03, err_msg=name)
  again = inputs_of(stored, jnp.int32(1))
  assert (np.asarray(again["discrimination z"]) != np.asarray(from_stored["discrimination z"])).any() == sample
