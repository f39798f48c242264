"""Build the optimizer of a config: regexes over parameter paths give groups, groups have rates; AdamW and averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from diffdis_jax.common.params import Params, first_match
from diffdis_jax.config.sections import Optim
from diffdis_jax.errors import UserError
from diffdis_jax.method.losses import MAX_LOGIT_SCALE

FROZEN = "frozen"
# Measured, not trained: the latents' shift and scale.
STATISTICS = r"^autoencoder\.(shift|scale)$"
MOMENTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def groups_of(paths: Iterable[str], groups: Sequence[tuple[str, str]]) -> dict[str, str]:
  """Return the group of each parameter, by the first regex of `groups` that is found in its path.

  Raises:
    UserError: a parameter that no regex matches.
  """
  rules = ((STATISTICS, FROZEN), *groups)  # first, so that no config can train them
  return {path: first_match(path, rules, "optim.groups") for path in paths}


def _epoch_schedule(section: Optim, peak: float, num_steps: int) -> optax.Schedule:
  """Return VL-LTR's schedule: timm's cosine, which changes once an epoch, one epoch late, as timm steps it after each.

  In epoch n, from 0, it is that of t = max(n - 1, 0): while t is in the warm-up, on the way from `warmup_rate` to the
  peak; then half a cosine over all epochs, the warm-up's included.
  """
  warmup, epochs = section.warmup_steps // section.epoch_steps, num_steps / section.epoch_steps

  def rate(step: Any) -> Float[Array, "..."]:
    t = jnp.maximum(step // section.epoch_steps - 1, 0).astype(jnp.float32)
    rising = section.warmup_rate + t * (peak - section.warmup_rate) / max(warmup, 1)
    return jnp.where(t < warmup, rising, 0.5 * peak * (1.0 + jnp.cos(jnp.pi * t / epochs)))

  return rate


def rate_schedule(section: Optim, group: str, *, num_steps: int) -> optax.Schedule:
  """Return the learning rate of a group over the whole run, as its section says; the first step is taken at the
  schedule's 0."""
  peak, warmup, final = section.rates[group], section.warmup_steps, section.final_fraction
  if section.schedule_kind == "epoch_cosine":
    return _epoch_schedule(section, peak, num_steps)
  rest = max(num_steps - warmup, 1)  # optax refuses a decay over no steps
  after = {
    "constant": lambda: optax.constant_schedule(peak),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
    "linear": lambda: optax.linear_schedule(peak, peak * final, rest),
  }
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after[section.schedule_kind]()], [warmup])


def build_optimizer(paths: Iterable[str], section: Optim, *, num_steps: int) -> optax.GradientTransformationExtraArgs:
  """Build AdamW over the trainable parameters, one learning rate a group, after clipping the gradient's global norm.

  Its `update` takes the number of finished steps as `step`, which the rates follow: a count of the optimizer's own
  would stand still at steps that are left out, and the schedule would end short.

  Raises:
    UserError: an unmatched parameter, or a group without a rate.
  """
  labels = groups_of(paths, section.groups)
  for path, group in labels.items():
    if group not in section.rates:
      raise UserError(f"optim.rates has no {group!r}, the group of {path}; it has {', '.join(sorted(section.rates))}")
  decayed = {path: first_match(path, ((section.no_decay, False), ("", True)), "optim.no_decay") for path in labels}

  def decay_mask(params: Params) -> Params:
    # Parameters of other groups arrive as empty nodes, and stay so.
    return {path: node if isinstance(node, optax.MaskedNode) else decayed[path] for path, node in params.items()}

  def adamw(group: str) -> optax.GradientTransformation:
    rate = rate_schedule(section, group, num_steps=num_steps)
    return optax.chain(_adam(section), optax.add_decayed_weights(section.weight_decay, decay_mask), _scale_by(rate))

  # Sorted, since a set has another order in each process.
  by_group = optax.partition({group: adamw(group) for group in sorted(set(labels.values()))}, labels)
  return optax.chain(optax.clip_by_global_norm(section.clip_norm), by_group) if section.clip_norm else by_group


def _adam(section: Optim) -> optax.GradientTransformation:
  """Return Adam without a rate, whose first moment has its own dtype between steps alone."""
  adam = optax.scale_by_adam(section.b1, section.b2, section.eps, mu_dtype=MOMENTS[section.first_moment])

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    # b1 is a Python number, which beside an array of bf16 is one of bf16 too: 0.898 for 0.9, and 1 for 0.999.
    moment = jax.tree.map(lambda x: x.astype(jnp.float32), state.mu)
    return adam.update(updates, state._replace(mu=moment), params)

  return optax.GradientTransformation(adam.init, update)


def _scale_by(rate: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
  """Descend by the rate at `step`."""

  def update(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> tuple[Any, Any]:
    del params
    return jax.tree.map(lambda x: jnp.asarray(-rate(step), x.dtype) * x, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))


def limit_logit_scale(params: Params) -> Params:
  """Limit CLIP's logit_scale to [0, ln 100], as open_clip does after each step."""
  if "logit_scale" not in params:  # it is frozen
    return params
  return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}


def update_ema(new: Params, old: Params, *, decay: float, step: Int[Array, ""]) -> Params:
  """Average the weights exponentially: old · d + new · (1 − d), d = min(decay, (1 + step) / (10 + step)).

  The ramp, TensorFlow's, is not stated by the paper; it lets short runs forget their initial values. It passes 0.9999
  after 89,990 steps: with that decay a run of the paper's 17,027 ends at 0.99947.
  """
  # Of steps finished before this one, as the state counts them: the first average is 0.1 old, 0.9 new.
  step = step.astype(jnp.float32)
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return cast(Params, optax.incremental_update(new, old, 1.0 - rate))
