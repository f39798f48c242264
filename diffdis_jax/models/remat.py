"""Rematerialisation: what of a block is kept for the backward pass, and what is computed again there."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from diffdis_jax.models.attention import platform

# What the backward pass keeps of a block: everything; nothing but its input; matrix products; those without a batch;
# its input and attention's q, k and v.
ATTENTION_INPUTS = "attention_inputs"
REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_INPUTS),
}

_KEEPS_ALL: contextvars.ContextVar[bool] = contextvars.ContextVar("keeps_all", default=False)


@contextlib.contextmanager
def keeping_all() -> Iterator[None]:
  """Trace what is within with nothing computed twice, whatever a network's `remat` says."""
  token = _KEEPS_ALL.set(True)
  try:
    yield
  finally:
    _KEEPS_ALL.reset(token)


def run_block(f: Callable[..., Any], block: nnx.Module, *args: Any, remat: str) -> Any:
  """Compute f(block, *args), of which the backward pass keeps what `remat`, a key of REMAT_POLICIES, says.

  Not by nnx.remat, which writes parameters back, and so cannot stand inside a sampler's loop.
  """
  if remat == "none" or _KEEPS_ALL.get():
    return f(block, *args)
  # Split, since jax.checkpoint takes arrays alone: a module closed over would be kept whole for the backward pass.
  graphdef, state = nnx.split(block)
  pure = jax.checkpoint(lambda state, *args: f(nnx.merge(graphdef, state), *args), policy=REMAT_POLICIES[remat])
  inputs = (state, *args)
  return pure(*(inputs if platform() == "tpu" else _gradients_together(inputs)))


@jax.custom_vjp
def _gradients_together(x: Any) -> Any:
  """Return x, none of whose gradients is there before all are.

  Else XLA's compiler for GPUs puts off the products for the gradients of parameters until the backward pass is through
  all blocks, and holds what they multiply, which was to be computed again to save memory. What TPUs' does was not
  looked at.
  """
  return x


_gradients_together.defvjp(lambda x: (x, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))
