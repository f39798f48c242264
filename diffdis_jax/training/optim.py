"""Build the optimizer of a config, AdamW with a learning rate for each group of parameters, and average weights."""

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
# The latents' shift and scale, which are measured and not trained.
STATISTICS = r"^autoencoder\.(shift|scale)$"
MOMENTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def groups_of(paths: Iterable[str], groups: Sequence[tuple[str, str]]) -> dict[str, str]:
  """Return the group of each parameter, by the first regex of `groups` that matches its path.

  Raises:
    UserError: no regex matches a parameter.
  """
  rules = ((STATISTICS, FROZEN), *groups)  # this rule is first, so that no config can train them
  return {path: first_match(path, rules, "optim.groups") for path in paths}


def _epoch_schedule(section: Optim, peak: float, num_steps: int) -> optax.Schedule:
  """Return VL-LTR's schedule: timm's cosine, which changes after each epoch, and one epoch late.

  In epoch n, counted from 0, the rate is that of t = max(n - 1, 0). During the warm-up it increases linearly from
  `warmup_rate` to the peak. Afterwards it is half a cosine over all epochs, including the warm-up.
  """
  warmup, epochs = section.warmup_steps // section.epoch_steps, num_steps / section.epoch_steps

  def rate(step: Any) -> Float[Array, "..."]:
    t = jnp.maximum(step // section.epoch_steps - 1, 0).astype(jnp.float32)
    rising = section.warmup_rate + t * (peak - section.warmup_rate) / max(warmup, 1)
    return jnp.where(t < warmup, rising, 0.5 * peak * (1.0 + jnp.cos(jnp.pi * t / epochs)))

  return rate


def rate_schedule(section: Optim, group: str, *, num_steps: int) -> optax.Schedule:
  """Return the learning-rate schedule of a group over the whole run by its section; the first step has the schedule's
  value at 0."""
  peak, warmup, final = section.rates[group], section.warmup_steps, section.final_fraction
  if section.schedule_kind == "epoch_cosine":
    return _epoch_schedule(section, peak, num_steps)
  rest = max(num_steps - warmup, 1)  # optax refuses a decay over 0 steps
  after = {
    "constant": lambda: optax.constant_schedule(peak),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
    "linear": lambda: optax.linear_schedule(peak, peak * final, rest),
  }
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after[section.schedule_kind]()], [warmup])


def build_optimizer(paths: Iterable[str], section: Optim, *, num_steps: int) -> optax.GradientTransformationExtraArgs:
  """Build AdamW for the trainable parameters, with a learning rate for each group, after clipping the global norm.

  Its `update` takes the number of finished steps as `step`, which determines the rates: the optimizer's own count would
  not include skipped steps, and the schedule would not reach its end.

  Raises:
    UserError: no rule matches a parameter, or a group has no rate.
  """
  labels = groups_of(paths, section.groups)
  for path, group in labels.items():
    if group not in section.rates:
      raise UserError(f"optim.rates has no {group!r}, the group of {path}; it has {', '.join(sorted(section.rates))}")
  decayed = {path: first_match(path, ((section.no_decay, False), ("", True)), "optim.no_decay") for path in labels}

  def decay_mask(params: Params) -> Params:
    # Parameters of other groups are empty nodes, and stay so.
    return {path: node if isinstance(node, optax.MaskedNode) else decayed[path] for path, node in params.items()}

  def adamw(group: str) -> optax.GradientTransformation:
    rate = rate_schedule(section, group, num_steps=num_steps)
    return optax.chain(_adam(section), optax.add_decayed_weights(section.weight_decay, decay_mask), _scale_by(rate))

  # Sorted, since the order of a set differs between processes.
  by_group = optax.partition({group: adamw(group) for group in sorted(set(labels.values()))}, labels)
  return optax.chain(optax.clip_by_global_norm(section.clip_norm), by_group) if section.clip_norm else by_group


def _adam(section: Optim) -> optax.GradientTransformation:
  """Return Adam without a learning rate. Its first moment is stored in its own dtype between steps."""
  adam = optax.scale_by_adam(section.b1, section.b2, section.eps, mu_dtype=MOMENTS[section.first_moment])

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    # With a moment in bf16, the Python number b1 would be rounded to bf16: 0.9 to 0.898, and 0.999 to 1.
    moment = jax.tree.map(lambda x: x.astype(jnp.float32), state.mu)
    return adam.update(updates, state._replace(mu=moment), params)

  return optax.GradientTransformation(adam.init, update)


def _scale_by(rate: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
  """Scale updates by minus the learning rate at `step`."""

  def update(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> tuple[Any, Any]:
    del params
    return jax.tree.map(lambda x: jnp.asarray(-rate(step), x.dtype) * x, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))


def limit_logit_scale(params: Params) -> Params:
  """Limit CLIP's logit_scale to [0, ln 100], as open_clip does after each step."""
  if "logit_scale" not in params:  # logit_scale is frozen
    return params
  return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}


def update_ema(new: Params, old: Params, *, decay: float, step: Int[Array, ""]) -> Params:
  """Average the weights exponentially: old · d + new · (1 − d), with d = min(decay, (1 + step) / (10 + step)).

  The ramp of d, as in TensorFlow, lets short runs forget their initial values (not stated by the paper). It reaches
  0.9999 after 89,990 steps; in the paper's run of 17,027 steps, d ends at 0.99947.
  """
  # `step` counts the steps before this one, so that the first average is 0.1 old + 0.9 new.
  step = step.astype(jnp.float32)
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return cast(Params, optax.incremental_update(new, old, 1.0 - rate))
