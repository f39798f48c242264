from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from diffdis_jax.errors import UserError
from diffdis_jax.training import optim

GROUPS = (("^unet.*new", "new"), ("^unet", "pretrained"), ("^text", "frozen"), (".*", "new"))
NUM_STEPS = 100
SETTINGS = dict(
  groups=GROUPS,
  rates={"new": 1e-2, "pretrained": 1e-3},
  schedule_kind="constant",
  warmup_steps=0,
  final_fraction=0.0,
  weight_decay=0.1,
  no_decay="bias$|norm",
  b1=0.8,
  b2=0.95,
  eps=1e-3,
  clip_norm=0.0,
  ema_decay=0.99,
  accumulate=1,
)
SHAPES = {"unet.conv.kernel": (3, 4), "unet.conv.bias": (4,), "unet.new.kernel": (4, 2), "head.norm.scale": (2,)}
RATES = {"unet.conv.kernel": 1e-3, "unet.conv.bias": 1e-3, "unet.new.kernel": 1e-2, "head.norm.scale": 1e-2}


def draw(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def make(*, num_steps: int = NUM_STEPS, **changes) -> optax.GradientTransformationExtraArgs:
  return optim.build_optimizer(SHAPES, optim.Optim(**{**SETTINGS, **changes}), num_steps=num_steps)


def run(optimizer: optax.GradientTransformationExtraArgs, steps: int = 4) -> list[dict[str, np.ndarray]]:
  """Return the parameters after each step. The gradients differ from step to step."""
  params, history = draw(0), []
  with jax.numpy_dtype_promotion("standard"):
    state = optimizer.init(params)
    for i in range(steps):
      updates, state = optimizer.update(draw(i + 1), state, params, step=jnp.int32(i))
      params = optax.apply_updates(params, updates)
      history.append({path: np.asarray(x) for path, x in params.items()})
  return history


def adamw_by_hand(*, rates: dict[str, float], clip_norm: float = np.inf, steps: int = 4) -> list[dict[str, np.ndarray]]:
  """Compute algorithm 2 of Loshchilov and Hutter 2019 in float64."""
  b1, b2, eps, decay = (SETTINGS[name] for name in ("b1", "b2", "eps", "weight_decay"))
  params = {path: x.astype(np.float64) for path, x in draw(0).items()}
  m = v = {path: 0.0 for path in params}
  history = []
  for i in range(1, steps + 1):
    gradient = draw(i)
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in gradient.values()))
    gradient = {path: x * min(1, clip_norm / norm) for path, x in gradient.items()}
    m = {path: b1 * m[path] + (1 - b1) * g for path, g in gradient.items()}
    v = {path: b2 * v[path] + (1 - b2) * g**2 for path, g in gradient.items()}
    for path, x in params.items():
      update = m[path] / (1 - b1**i) / (np.sqrt(v[path] / (1 - b2**i)) + eps)
      weight = 0 if path.endswith("bias") or "norm" in path else decay
      params = {**params, path: x - rates[path] * (update + weight * x)}
    history.append(params)
  return history


def assert_same(history: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
  for got, want in zip(history, expected, strict=True):
    for path in SHAPES:
      np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_first_group_that_matches_wins():
  paths = ["unet.new.kernel", "unet.conv.kernel", "text_encoder.tokens", "logit_scale", "autoencoder.shift"]
  expected = ["new", "pretrained", "frozen", "new", "frozen"]
  assert list(optim.groups_of(paths, GROUPS).values()) == expected
  assert optim.groups_of(["unet.new.kernel"], GROUPS[::-1]) == {"unet.new.kernel": "new"}
  statistics = {"autoencoder.shift": "frozen", "autoencoder.scale": "frozen", "autoencoder.norm.scale": "new"}
  assert optim.groups_of(statistics, ((".*", "new"),)) == statistics


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(groups=(("^head", "new"),)), "no rule of optim.groups matches parameter unet.conv.kernel"),
    (dict(rates={"new": 1e-2}), "optim.rates has no 'pretrained', the group of unet.conv.kernel; it has new"),
    (dict(first_moment="float16"), "first_moment"),
    (dict(schedule_kind="cosin"), "schedule_kind is 'cosin'; .* constant, cosine, linear"),
    (dict(final_fraction=0.1), "final_fraction is 0.1; it belongs to schedule_kind cosine and linear, .* constant: "),
    (dict(warmup_rate=1e-6, schedule_kind="cosine"), "warmup_rate is 1e-06; it belongs to schedule_kind epoch_cosine,"),
    (dict(schedule_kind="epoch_cosine"), "epoch_steps is 0; it must be at least 1"),
    (dict(schedule_kind="epoch_cosine", epoch_steps=4, warmup_steps=6), "whole epochs of 4 steps"),
  ],
)
def test_wrong_fields_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    make(**changes)


def test_groups_have_their_own_rate_and_biases_and_norms_no_decay():
  assert_same(run(make()), adamw_by_hand(rates=RATES))


@pytest.mark.parametrize("b1", [0.9, 0.99])
def test_a_first_moment_in_bfloat16_decays_by_the_exact_b1(b1):
  """If b1 were rounded to bfloat16, the moment would be too small by 1.5 % or 15 %."""
  gradients = np.random.default_rng(0).normal(1.0, 1.0, (300, 512)).astype(np.float32)
  section, params = optim.Optim(first_moment="bfloat16", b1=b1, clip_norm=0.0), {"head.kernel": jnp.zeros(512)}
  optimizer = optim.build_optimizer(params, section, num_steps=NUM_STEPS)
  with jax.numpy_dtype_promotion("standard"):
    update = functools.partial(optimizer.update, params=params, step=jnp.int32(0))
    step = lambda state, gradient: (update({"head.kernel": gradient}, state)[1], None)
    state, _ = jax.lax.scan(step, optimizer.init(params), jnp.asarray(gradients))
  (moment,) = (x for _, x in optax.tree.get_all_with_path(state, "mu") for x in jax.tree.leaves(x))
  weights = (1 - b1) * b1 ** np.arange(300)[::-1]
  expected = weights @ gradients.astype(np.float64)
  assert moment.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(moment, np.float64).mean(), expected.mean(), rtol=3e-3)


def test_the_gradient_is_clipped_by_the_norm_over_all_groups():
  assert_same(run(make(clip_norm=0.01)), adamw_by_hand(rates=RATES, clip_norm=0.01))
  unclipped = adamw_by_hand(rates=RATES)[-1]
  assert np.abs(run(make(clip_norm=0.01))[-1]["unet.new.kernel"] - unclipped["unet.new.kernel"]).max() > 1e-4
  assert_same(run(make(clip_norm=1e6)), adamw_by_hand(rates=RATES))


@pytest.mark.parametrize(
  "kind, after",
  [
    ("constant", lambda share: 1.0),
    ("linear", lambda share: 1 - 0.9 * share),
    ("cosine", lambda share: 0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2),
  ],
)
def test_a_schedule_has_its_formula_after_the_warmup(kind, after):
  final = 0.0 if kind == "constant" else 0.1
  section = optim.Optim(rates=dict(new=2.0), schedule_kind=kind, warmup_steps=10, final_fraction=final)
  schedule = optim.rate_schedule(section, "new", num_steps=50)
  steps = np.arange(60)
  expected = [2.0 * i / 10 if i < 10 else 2.0 * after(min((i - 10) / 40, 1.0)) for i in steps]
  values = lambda schedule: [schedule(float(i)) for i in steps]
  np.testing.assert_allclose(values(schedule), expected, rtol=1e-5, atol=1e-7)
  if kind == "cosine":
    warmed = optax.warmup_cosine_decay_schedule(0.0, 2.0, 10, 50, end_value=0.2)
    np.testing.assert_allclose(values(schedule), values(warmed), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step, rate", [(0, 0.1), (1, 2 / 11), (40, 41 / 50), (80, 0.9), (10**6, 0.9)])
def test_the_average_equals_optax_incremental_update_with_a_ramp(step, rate):
  new, old = draw(1), draw(2)
  average = optim.update_ema(new, old, decay=0.9, step=jnp.asarray(step, jnp.int32))
  expected = optax.incremental_update(new, old, 1 - rate)
  for path in SHAPES:
    np.testing.assert_allclose(average[path], expected[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup_epochs, peak", [(5, 1e-5), (0, 5e-5)])
def test_the_rate_of_an_epoch_is_timms_of_the_epoch_before(warmup_epochs, peak):
  """VL-LTR's main.py calls timm's `step(epoch)` after an epoch, so that the next epoch has this epoch's rate."""
  epochs, epoch_steps = 50, 3
  parameter = torch.nn.Parameter(torch.zeros(()))
  scheduler = CosineLRScheduler(
    torch.optim.SGD([parameter], lr=peak), t_initial=epochs, warmup_t=warmup_epochs, warmup_lr_init=1e-6
  )
  rates = []
  for epoch in range(epochs):
    rates += [scheduler.optimizer.param_groups[0]["lr"]] * epoch_steps
    scheduler.step(epoch)
  section = optim.Optim(
    rates=dict(new=peak),
    schedule_kind="epoch_cosine",
    epoch_steps=epoch_steps,
    warmup_steps=warmup_epochs * epoch_steps,
    warmup_rate=1e-6,
  )
  ours = optim.rate_schedule(section, "new", num_steps=epochs * epoch_steps)
  np.testing.assert_allclose([float(ours(jnp.int32(i))) for i in range(epochs * epoch_steps)], rates, rtol=1e-5)


def test_the_optimizer_takes_the_rate_of_the_epoch():
  optimizer = make(schedule_kind="epoch_cosine", epoch_steps=2, num_steps=8)
  rates = [1.0, 1.0, 1.0, 1.0, 0.5 * (1 + np.cos(np.pi / 4)), 0.5 * (1 + np.cos(np.pi / 4))]
  constant = run(make(), steps=6)
  scheduled = run(optimizer, steps=6)
  path = "unet.conv.kernel"
  np.testing.assert_allclose(scheduled[3][path], constant[3][path], rtol=1e-6)
  step = lambda history: history[4][path] - history[3][path]
  np.testing.assert_allclose(step(scheduled), rates[4] * step(constant), rtol=1e-3, atol=1e-7)
