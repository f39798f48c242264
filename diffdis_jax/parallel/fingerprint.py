"""A hash of parameters, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from diffdis_jax.parallel import processes


def fingerprint(params: Mapping[str, Any]) -> str:
  """On every process the same, whatever the mesh: it tells whether two sets of parameters have the same bits.

  Of each array it holds two sums of all its bits, of which one weighs them by their place. Sums of whole numbers do not
  depend on the order in which devices add them.
  """
  names, digest = sorted(params), hashlib.sha256()
  if not names:
    return digest.hexdigest()
  # One program for all of them, which reads arrays where they lie: no process need have a whole one.
  sums = jax.jit(lambda arrays: jnp.stack([_sums(x) for x in arrays]))([params[name] for name in names])
  for name, pair in zip(names, processes.whole(sums), strict=True):
    digest.update(f"{name} {params[name].shape} {params[name].dtype} {pair.tolist()}\n".encode())
  return digest.hexdigest()


def _sums(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  weights = 2 * place + 1  # odd, so that no bit is lost where it is multiplied
  return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * weights).sum(dtype=jnp.uint32)])
