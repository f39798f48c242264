from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from configs import diffdis_cc3m
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
  """The parameters after each step, with other gradients each time."""
  params, history = draw(0), []
  with jax.numpy_dtype_promotion("standard"):
    state = optimizer.init(params)
    for i in range(steps):
      updates, state = optimizer.update(draw(i + 1), state, params, step=jnp.int32(i))
      params = optax.apply_updates(params, updates)
      history.append({path: np.asarray(x) for path, x in params.items()})
  return history


def adamw_by_hand(*, rates: dict[str, float], clip_norm: float = np.inf, steps: int = 4) -> list[dict[str, np.ndarray]]:
  """Loshchilov and Hutter 2019, algorithm 2, in float64."""
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


def assert_same(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
  for got, want in zip(found, expected, strict=True):
    for path in SHAPES:
      np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_first_group_that_matches_wins():
  paths = ["unet.new.kernel", "unet.conv.kernel", "text_encoder.tokens", "logit_scale", "autoencoder.shift"]
  expected = ["new", "pretrained", "frozen", "new", "frozen"]
  assert list(optim.groups_of(paths, GROUPS).values()) == expected
  assert optim.groups_of(["unet.new.kernel"], GROUPS[::-1]) == {"unet.new.kernel": "new"}


def test_latent_statistics_are_never_trained():
  names = {"autoencoder.shift": "frozen", "autoencoder.scale": "frozen", "autoencoder.norm.scale": "new"}
  assert optim.groups_of(names, ((".*", "new"),)) == names


def test_an_unmatched_parameter_is_named():
  with pytest.raises(UserError, match="no rule of optim.groups matches parameter unet.conv.kernel"):
    make(groups=(("^head", "new"),))


def test_a_group_without_a_rate_is_named():
  with pytest.raises(UserError, match="optim.rates has no 'pretrained', the group of unet.conv.kernel; it has new"):
    make(rates={"new": 1e-2})


def test_each_group_takes_its_own_rate_and_decay_spares_biases_and_norms():
  assert_same(run(make()), adamw_by_hand(rates=RATES))


def test_a_first_moment_of_bfloat16_is_adamw_to_its_rounding():
  state = make(first_moment="bfloat16").init(draw(0))
  for moment, dtype in (("mu", "bfloat16"), ("nu", "float32")):
    kept = [value for _, value in optax.tree.get_all_with_path(state, moment)]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {dtype}
  found, expected = run(make(first_moment="bfloat16"))[-1], adamw_by_hand(rates=RATES)[-1]
  for path, start in draw(0).items():
    moved = np.abs(expected[path] - start).max()
    assert 0 < np.abs(found[path] - expected[path]).max() < 2**-7 * moved, path


@pytest.mark.parametrize("b1", [0.9, 0.99])
def test_a_first_moment_of_bfloat16_decays_by_b1_itself(b1):
  """By the bf16 that is nearest to b1, the mean would be 1.5 % too small, or 15 %."""
  gradients = np.random.default_rng(0).normal(1.0, 1.0, (300, 512)).astype(np.float32)
  section, params = optim.Optim(first_moment="bfloat16", b1=b1, clip_norm=0.0), {"head.kernel": jnp.zeros(512)}
  optimizer = optim.build_optimizer(params, section, num_steps=NUM_STEPS)
  with jax.numpy_dtype_promotion("standard"):
    update = functools.partial(optimizer.update, params=params, step=jnp.int32(0))
    step = lambda state, gradient: (update({"head.kernel": gradient}, state)[1], None)
    state, _ = jax.lax.scan(step, optimizer.init(params), jnp.asarray(gradients))
  (found,) = (x for _, x in optax.tree.get_all_with_path(state, "mu") for x in jax.tree.leaves(x))
  weights = (1 - b1) * b1 ** np.arange(300)[::-1]
  expected = weights @ gradients.astype(np.float64)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(found, np.float64).mean(), expected.mean(), rtol=3e-3)


def test_a_moment_of_another_dtype_is_refused():
  with pytest.raises(UserError, match="first_moment"):
    make(first_moment="float16")


def test_a_rate_of_zero_stands_still():
  moved = run(make(rates={"new": 1e-2, "pretrained": 0.0}))[-1]
  start = draw(0)
  assert [path for path in SHAPES if (moved[path] != start[path]).any()] == ["unet.new.kernel", "head.norm.scale"]


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
def test_schedules(kind, after):
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


def test_schedule_without_warm_up_starts_at_its_peak():
  section = optim.Optim(rates=dict(new=2.0), schedule_kind="linear", warmup_steps=0)
  schedule = optim.rate_schedule(section, "new", num_steps=4)
  np.testing.assert_allclose([schedule(i) for i in range(5)], [2.0, 1.5, 1.0, 0.5, 0.0])


def test_the_schedule_scales_the_rate_of_each_step():
  found = run(make(schedule_kind="linear", warmup_steps=2, num_steps=4))
  start = draw(0)
  assert all((found[0][path] == start[path]).all() for path in SHAPES), "the first step has rate 0"
  assert all((found[1][path] != found[0][path]).all() for path in SHAPES)


def test_an_unknown_schedule_is_told_the_known_ones():
  with pytest.raises(UserError, match="schedule_kind is 'cosin'; .* constant, cosine, linear"):
    make(schedule_kind="cosin")


@pytest.mark.parametrize("step, rate", [(0, 0.1), (1, 2 / 11), (40, 41 / 50), (80, 0.9), (10**6, 0.9)])
def test_average_is_optax_incremental_update_with_a_ramp(step, rate):
  new, old = draw(1), draw(2)
  found = optim.update_ema(new, old, decay=0.9, step=jnp.asarray(step, jnp.int32))
  expected = optax.incremental_update(new, old, 1 - rate)
  for path in SHAPES:
    np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[path], rate * old[path] + (1 - rate) * new[path], rtol=1e-5, atol=1e-6)


def test_the_papers_run_ends_before_its_decay_is_reached():
  """As configs/diffdis_cc3m.py, replication/index.md and `update_ema` say."""
  config = diffdis_cc3m.get_config()
  weight = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
  decay = lambda step: float(optim.update_ema(*weight, decay=config.optim.ema_decay, step=jnp.int32(step))["w"][0])
  assert config.num_steps == 17_027 and config.optim.ema_decay == 0.9999
  assert round(decay(config.num_steps - 1), 5) == 0.99947
  assert decay(89_000) < decay(89_990) == decay(10**6) == pytest.approx(0.9999, abs=1e-7)


@pytest.mark.parametrize("warmup_epochs, peak", [(5, 1e-5), (0, 5e-5)])
def test_the_rate_of_an_epoch_is_timms_told_of_it_one_late(warmup_epochs, peak):
  """As VL-LTR's main.py steps timm's scheduler: `step(epoch)` at an epoch's end."""
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
  found = [float(ours(jnp.int32(step))) for step in range(epochs * epoch_steps)]
  np.testing.assert_allclose(found, rates, rtol=1e-5)
  if warmup_epochs:  # as written out
    assert found[0] == found[5] == pytest.approx(1e-6) and found[6] == pytest.approx(1e-6 + 9e-6 / 5)
    assert found[-1] == pytest.approx(0.5 * (1 + np.cos(np.pi * 48 / 50)) * 1e-5, rel=1e-3)


def test_the_optimizer_takes_the_rate_of_the_epoch():
  optimizer = make(schedule_kind="epoch_cosine", epoch_steps=2, num_steps=8)
  rates = [1.0, 1.0, 1.0, 1.0, 0.5 * (1 + np.cos(np.pi / 4)), 0.5 * (1 + np.cos(np.pi / 4))]
  constant = run(make(), steps=6)
  found = run(optimizer, steps=6)
  path = "unet.conv.kernel"
  np.testing.assert_allclose(found[3][path], constant[3][path], rtol=1e-6)
  step = lambda history: history[4][path] - history[3][path]
  np.testing.assert_allclose(step(found), rates[4] * step(constant), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(final_fraction=0.1), "final_fraction is 0.1; it belongs to schedule_kind cosine and linear, .* constant: "),
    (dict(final_fraction=0.1, schedule_kind="epoch_cosine", epoch_steps=2), "final_fraction is 0.1; .* epoch_cosine: "),
    (dict(warmup_rate=1e-6, schedule_kind="cosine"), "warmup_rate is 1e-06; it belongs to schedule_kind epoch_cosine,"),
  ],
)
def test_fields_of_another_schedule(changes, message):
  with pytest.raises(UserError, match=message):
    optim.Optim(**{**SETTINGS, **changes})
  assert optim.Optim(**{**SETTINGS, "final_fraction": 0.1, "schedule_kind": "linear"}).final_fraction == 0.1


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(schedule_kind="epoch_cosine"), "epoch_steps is 0; it must be at least 1"),
    (dict(schedule_kind="epoch_cosine", epoch_steps=4, warmup_steps=6), "whole epochs of 4 steps"),
    (dict(warmup_rate=-1.0), "warmup_rate is -1.0"),
  ],
)
def test_epochs_that_are_none(changes, message):
  with pytest.raises(UserError, match=message):
    optim.Optim(**{**SETTINGS, **changes})


def test_a_frozen_scale_needs_no_limit():
  params = {"vision_encoder.patch.kernel": np.ones(2, np.float32)}
  assert optim.limit_logit_scale(params) == params
