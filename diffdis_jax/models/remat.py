"""Rematerialisation: which results of a block are kept for the backward pass, and which are computed again."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from diffdis_jax.models.attention import platform

# What is kept of a block for the backward pass: everything; only its input; matrix products; matrix products without a
# batch axis; its input and attention's q, k and v.
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
  """Trace the block without rematerialisation, whatever a network's `remat` says."""
  token = _KEEPS_ALL.set(True)
  try:
    yield
  finally:
    _KEEPS_ALL.reset(token)


def run_block(f: Callable[..., Any], block: nnx.Module, *args: Any, remat: str) -> Any:
  """Compute f(block, *args), keeping for the backward pass what the policy `remat` of REMAT_POLICIES says.

  nnx.remat writes parameters back, and so cannot be used inside a sampler's loop.
  """
  if remat == "none" or _KEEPS_ALL.get():
    return f(block, *args)
  # Split the module: jax.checkpoint takes only arrays, and would keep a closed-over module for the backward pass.
  graphdef, state = nnx.split(block)
  pure = jax.checkpoint(lambda state, *args: f(nnx.merge(graphdef, state), *args), policy=REMAT_POLICIES[remat])
  inputs = (state, *args)
  return pure(*(inputs if platform() == "tpu" else _gradients_together(inputs)))


@jax.custom_vjp
def _gradients_together(x: Any) -> Any:
  """Return x with gradients that become available only all at once.

  Otherwise XLA's compiler for GPUs delays the products for the gradients of parameters until the backward pass has
  passed all blocks, and keeps their factors, which rematerialisation should have freed. The compiler for TPUs was not
  examined.
  """
  return x


_gradients_together.defvjp(lambda x: (x, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))
