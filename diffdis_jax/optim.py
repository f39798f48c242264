"""Optimizer from a config section: regexes over parameter paths give groups; groups have rates; AdamW; EMA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from diffdis_jax import tree
from diffdis_jax.structs import UserError
from diffdis_jax.tree import Params

FROZEN = "frozen"
# Measured, not trained: the latents' shift and scale.
STATISTICS = r"^autoencoder\.(shift|scale)$"


def groups_of(paths: Iterable[str], groups: Sequence[tuple[str, str]]) -> dict[str, str]:
  """Group of each parameter, by the first regex of `groups` that is found in its path.

  Raises:
    UserError: a parameter that no regex matches.
  """
  rules = ((STATISTICS, FROZEN), *groups)
  return {path: tree.first_match(path, rules, "optim.groups") for path in paths}


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
  if kind not in after:
    raise UserError(f"optim.schedule_kind is {kind!r}; it must be one of {', '.join(after)}")
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after[kind]()], [warmup_steps])


def make(
  paths: Iterable[str],
  *,
  num_steps: int,
  groups: Sequence[tuple[str, str]],
  rates: Mapping[str, float],
  schedule_kind: str,
  warmup_steps: int,
  final_fraction: float,
  weight_decay: float,
  no_decay: str,
  b1: float,
  b2: float,
  eps: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW over the trainable parameters, one learning rate a group, clipped by their global norm.

  Args:
    paths: of the trainable parameters.
    num_steps: of the whole run, in optimizer steps.
    groups: (regex, group); the first match wins. Group `frozen` is not trained (and not among `paths`).
    rates: peak learning rate of each group. 1e-5 for pretrained and 1e-4 for new parameters is not stated by the paper.
    no_decay: regex of the paths without weight decay.
    clip_norm: largest global norm of the gradient; 0 for no clipping.

  Raises:
    UserError: an unmatched parameter, a group without a rate, an unknown schedule.
  """
  labels = groups_of(paths, groups)
  for path, group in labels.items():
    if group not in rates:
      raise UserError(f"optim.rates has no {group!r}, the group of {path}; it has {', '.join(sorted(rates))}")
  decayed = {path: tree.first_match(path, ((no_decay, False), ("", True)), "optim.no_decay") for path in labels}

  def adamw(group: str) -> optax.GradientTransformation:
    rate = schedule(
      rates[group],
      kind=schedule_kind,
      warmup_steps=warmup_steps,
      num_steps=num_steps,
      final_fraction=final_fraction,
    )
    # Parameters of other groups arrive as empty nodes, and stay so.
    mask = lambda params: {path: decayed[path] if labels[path] == group else node for path, node in params.items()}
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)

  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  return optax.chain(clip, optax.partition({group: adamw(group) for group in sorted(set(labels.values()))}, labels))


def ema(new: Params, old: Params, *, decay: float, step: Int[Array, ""]) -> Params:
  """Exponential moving average of weights: old · d + new · (1 − d), d = min(decay, (1 + step) / (10 + step)).

  The ramp, TensorFlow's, is not stated by the paper; it lets short runs forget their initial values.
  """
  step = step.astype(jnp.float32)
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(new, old, 1.0 - rate)
