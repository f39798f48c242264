"""Optimizer from a config section: regexes over parameter paths give groups; groups have rates; AdamW; EMA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from diffdis_jax.common.params import Params, first_match
from diffdis_jax.errors import UserError, check_choice, check_number, check_regex
from diffdis_jax.method.losses import MAX_LOGIT_SCALE

FROZEN = "frozen"
# Measured, not trained: the latents' shift and scale.
STATISTICS = r"^autoencoder\.(shift|scale)$"
SCHEDULE_KINDS = ("constant", "cosine", "linear", "epoch_cosine")
CONTRASTIVE_BATCHES = ("whole", "microbatch")
MOMENTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
  """A config's `optim` section. None of its values is stated by the paper for DiffDis.

  Attributes:
    groups: (regex, group); the first that is found in a parameter's path wins. Group `frozen` is not trained.
    rates: peak learning rate of each group but `frozen`.
    schedule_kind: after the warm-up: one of SCHEDULE_KINDS; `epoch_cosine` is VL-LTR's (`epoch_schedule`).
    warmup_steps: from rate 0 to the peak, linearly.
    final_fraction: of the peak, at the end of a decay.
    epoch_steps: of `epoch_cosine` alone, steps of an epoch, after which the rate changes.
    warmup_rate: of `epoch_cosine` alone, the rate at which the warm-up begins.
    weight_decay: AdamW's.
    no_decay: regex of the paths without weight decay.
    b1, b2, eps: AdamW's.
    first_moment: a key of MOMENTS, in which AdamW's first moment is kept. The second stays f32: with b2 = 0.999 it
      changes by less than bf16 can tell, and would stand still.
    clip_norm: largest global norm of the gradient; 0 for no clipping.
    ema_decay: of the averaged weights; a short run does not reach it (`update_ema`).
    accumulate: microbatches that a step takes one after another, so that less has to be in memory at a time.
    contrastive_batch: one of CONTRASTIVE_BATCHES: `whole`, all microbatches of a step are one contrastive batch, and
      their number leaves the step's result as it is (gradcache.py); `microbatch`, each is one of its own, with its own
      timesteps and noise.
    allow_uninitialized: regex of the frozen parameters that may be random: start.py refuses the others.

  Raises:
    UserError: a value out of its range.
  """

  groups: Sequence[tuple[str, str]]
  rates: Mapping[str, float]
  schedule_kind: str
  warmup_steps: int
  final_fraction: float
  weight_decay: float
  no_decay: str
  b1: float
  b2: float
  eps: float
  clip_norm: float
  ema_decay: float
  accumulate: int
  contrastive_batch: str = "microbatch"  # what a config means that was written before there was a choice
  allow_uninitialized: str = "^$"
  epoch_steps: int = 0
  warmup_rate: float = 0.0
  first_moment: str = "float32"

  def __post_init__(self) -> None:
    for regex in (*(regex for regex, _ in self.groups), self.no_decay):
      check_regex("groups or no_decay", regex)
    check_regex("allow_uninitialized", self.allow_uninitialized)
    for group, rate in self.rates.items():
      check_number(f"rates.{group}", rate, at_least=0.0)
    check_choice("schedule_kind", self.schedule_kind, SCHEDULE_KINDS)
    check_number("final_fraction", self.final_fraction, at_least=0.0, at_most=1.0)
    for name in ("warmup_steps", "weight_decay", "clip_norm"):
      check_number(name, getattr(self, name), at_least=0)
    for name in ("b1", "b2", "ema_decay"):
      check_number(name, getattr(self, name), at_least=0.0, below=1.0)
    check_number("eps", self.eps, above=0.0)
    check_number("accumulate", self.accumulate, at_least=1)
    check_choice("contrastive_batch", self.contrastive_batch, CONTRASTIVE_BATCHES)
    check_choice("first_moment", self.first_moment, MOMENTS)
    check_number("epoch_steps", self.epoch_steps, at_least=1 if self.schedule_kind == "epoch_cosine" else 0)
    check_number("warmup_rate", self.warmup_rate, at_least=0.0)
    if self.epoch_steps and self.warmup_steps % self.epoch_steps:
      raise UserError(f"warmup_steps is {self.warmup_steps}; it must be whole epochs of {self.epoch_steps} steps")


def groups_of(paths: Iterable[str], groups: Sequence[tuple[str, str]]) -> dict[str, str]:
  """Group of each parameter, by the first regex of `groups` that is found in its path.

  Raises:
    UserError: a parameter that no regex matches.
  """
  rules = ((STATISTICS, FROZEN), *groups)
  return {path: first_match(path, rules, "optim.groups") for path in paths}


def schedule(
  peak: float, *, kind: str, warmup_steps: int, num_steps: int, final_fraction: float = 0.0
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then `constant`, or `cosine` or `linear` decay to `final_fraction` of it."""
  rest = max(num_steps - warmup_steps, 1)
  after = {
    "constant": lambda: optax.constant_schedule(peak),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final_fraction),
    "linear": lambda: optax.linear_schedule(peak, peak * final_fraction, rest),
  }
  check_choice("optim.schedule_kind", kind, after)
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after[kind]()], [warmup_steps])


def epoch_schedule(
  peak: float, *, epoch_steps: int, warmup_steps: int, num_steps: int, warmup_rate: float
) -> optax.Schedule:
  """VL-LTR's: timm's cosine, which changes once an epoch, and one epoch late, since it is told of an epoch at its end.

  In epoch n, from 0, it is that of t = max(n - 1, 0): while t is in the warm-up, on the way from `warmup_rate` to the
  peak; then half a cosine over all epochs, the warm-up's included.
  """
  warmup, epochs = warmup_steps // epoch_steps, num_steps / epoch_steps

  def rate(step: Any) -> Float[Array, "..."]:
    t = jnp.maximum(step // epoch_steps - 1, 0).astype(jnp.float32)
    rising = warmup_rate + t * (peak - warmup_rate) / max(warmup, 1)
    return jnp.where(t < warmup, rising, 0.5 * peak * (1.0 + jnp.cos(jnp.pi * t / epochs)))

  return rate


def rate_schedule(section: Optim, group: str, *, num_steps: int) -> optax.Schedule:
  """The learning rate of a group, as its section says; the first step is taken at the schedule's 0.

  Args:
    num_steps: of the whole run, in optimizer steps.
  """
  peak, common = section.rates[group], dict(warmup_steps=section.warmup_steps, num_steps=num_steps)
  if section.schedule_kind == "epoch_cosine":
    return epoch_schedule(peak, epoch_steps=section.epoch_steps, warmup_rate=section.warmup_rate, **common)
  return schedule(peak, kind=section.schedule_kind, final_fraction=section.final_fraction, **common)


def build_optimizer(paths: Iterable[str], section: Optim, *, num_steps: int) -> optax.GradientTransformation:
  """AdamW over the trainable parameters, one learning rate a group, clipped by their global norm.

  Args:
    paths: of the trainable parameters.
    section: the run's settings.
    num_steps: of the whole run, in optimizer steps.

  Raises:
    UserError: an unmatched parameter, or a group without a rate.
  """
  labels = groups_of(paths, section.groups)
  for path, group in labels.items():
    if group not in section.rates:
      raise UserError(f"optim.rates has no {group!r}, the group of {path}; it has {', '.join(sorted(section.rates))}")
  decayed = {path: first_match(path, ((section.no_decay, False), ("", True)), "optim.no_decay") for path in labels}

  def adamw(group: str) -> optax.GradientTransformation:
    # Parameters of other groups arrive as empty nodes, and stay so.
    mask = lambda params: {path: decayed[path] if labels[path] == group else node for path, node in params.items()}
    return optax.adamw(
      rate_schedule(section, group, num_steps=num_steps),
      b1=section.b1,
      b2=section.b2,
      eps=section.eps,
      mu_dtype=MOMENTS[section.first_moment],
      weight_decay=section.weight_decay,
      mask=mask,
    )

  # Before the groups part: one norm over all that is trained.
  clip = optax.clip_by_global_norm(section.clip_norm) if section.clip_norm else optax.identity()
  return optax.chain(clip, optax.partition({group: adamw(group) for group in sorted(set(labels.values()))}, labels))


def limit_logit_scale(params: Params) -> Params:
  """The parameters with CLIP's logit_scale within [0, ln 100], as open_clip limits it after each step."""
  if "logit_scale" not in params:
    return params
  return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}


def update_ema(new: Params, old: Params, *, decay: float, step: Int[Array, ""]) -> Params:
  """Exponential moving average of weights: old · d + new · (1 − d), d = min(decay, (1 + step) / (10 + step)).

  The ramp, TensorFlow's, is not stated by the paper; it lets short runs forget their initial values. It passes 0.9999
  after 89,990 steps: with that decay a run of the paper's 17,027 ends at 0.99947.
  """
  # Of steps finished before this one, as the state counts them: the first average is 0.1 old, 0.9 new.
  step = step.astype(jnp.float32)
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return cast(Params, optax.incremental_update(new, old, 1.0 - rate))
