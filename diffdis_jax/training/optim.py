"""Optimizer from a config section: regexes over parameter paths give groups; groups have rates; AdamW; EMA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from diffdis_jax.common.params import Params, first_match
from diffdis_jax.config.sections import Optim
from diffdis_jax.errors import UserError
from diffdis_jax.method.losses import MAX_LOGIT_SCALE
from diffdis_jax.training.packing import Layout

FROZEN = "frozen"
# Measured, not trained: the latents' shift and scale.
STATISTICS = r"^autoencoder\.(shift|scale)$"
NOT_PACKED = Layout()
MOMENTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def groups_of(paths: Iterable[str], groups: Sequence[tuple[str, str]]) -> dict[str, str]:
  """Group of each parameter, by the first regex of `groups` that is found in its path.

  Raises:
    UserError: a parameter that no regex matches.
  """
  rules = ((STATISTICS, FROZEN), *groups)  # first, so that no config can train them
  return {path: first_match(path, rules, "optim.groups") for path in paths}


def _epoch_schedule(section: Optim, peak: float, num_steps: int) -> optax.Schedule:
  """VL-LTR's: timm's cosine, which changes once an epoch, and one epoch late, since timm steps it after each epoch.

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
  """The learning rate of a group, as its section says; the first step is taken at the schedule's 0.

  Args:
    num_steps: of the whole run, in optimizer steps.
  """
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


def kinds_of(groups: Mapping[str, str], section: Optim) -> dict[str, str]:
  """Of each parameter, by its group, what those that are packed together share: the group, and whether they decay."""
  names = {True: "decayed", False: "not_decayed"}
  decayed = _decayed_of(groups, section)
  return {path: group if group == FROZEN else f"{group}.{names[decayed[path]]}" for path, group in groups.items()}


def _decayed_of(paths: Iterable[str], section: Optim) -> dict[str, bool]:
  return {path: first_match(path, ((section.no_decay, False), ("", True)), "optim.no_decay") for path in paths}


def build_optimizer(
  paths: Iterable[str], section: Optim, *, num_steps: int, layout: Layout = NOT_PACKED
) -> optax.GradientTransformation:
  """AdamW over the trainable parameters, as they are packed, one learning rate a group.

  Args:
    paths: of the trainable parameters.
    section: the run's settings.
    num_steps: of the whole run, in optimizer steps.
    layout: packs those of one group, that decay or do not, together.

  Raises:
    UserError: an unmatched parameter, or a group without a rate.
  """
  labels = groups_of(paths, section.groups)
  for path, group in labels.items():
    if group not in section.rates:
      raise UserError(f"optim.rates has no {group!r}, the group of {path}; it has {', '.join(sorted(section.rates))}")
  labels, decayed = layout.common(labels), layout.common(_decayed_of(labels, section))

  def adamw(group: str) -> optax.GradientTransformation:
    def mask(params: Params) -> Params:
      # Parameters of other groups arrive as empty nodes, and stay so.
      return {path: decayed[path] if labels[path] == group else node for path, node in params.items()}

    return _decayed_in_f32(
      optax.adamw(
        rate_schedule(section, group, num_steps=num_steps),
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        mu_dtype=MOMENTS[section.first_moment],
        weight_decay=section.weight_decay,
        mask=mask,
      )
    )

  # Sorted, since a set has another order in each process.
  return optax.partition({group: adamw(group) for group in sorted(set(labels.values()))}, labels)


def _decayed_in_f32(adamw: optax.GradientTransformation) -> optax.GradientTransformation:
  """The same, whose first moment is bf16 between steps alone."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    # b1 is a Python number, which beside an array of bf16 is one of bf16 too: 0.898 for 0.9, and 1 for 0.999.
    adam, *rest = state
    moment = jax.tree.map(lambda x: x.astype(jnp.float32), adam.mu)
    return adamw.update(updates, (adam._replace(mu=moment), *rest), params)

  return optax.GradientTransformation(adamw.init, update)


def clip(gradient: Params, norm: Float[Array, ""], section: Optim) -> Params:
  """The gradient with a global norm of at most `section.clip_norm`, as optax.clip_by_global_norm has it.

  Args:
    gradient: by path or packed.
    norm: of all that is trained, by path: one of packed gradients would round otherwise.
  """
  if not section.clip_norm:
    return gradient
  return {name: jnp.where(norm < section.clip_norm, x, x / norm * section.clip_norm) for name, x in gradient.items()}


def limit_logit_scale(params: Params) -> Params:
  """The parameters with CLIP's logit_scale within [0, ln 100], as open_clip limits it after each step."""
  if "logit_scale" not in params:  # it is frozen
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
