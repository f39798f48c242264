"""Attention on TPUs in one Pallas kernel: scores and weights never leave the chip.

Arrays are [b, h, d, n]: channels lie in sublanes, tokens in lanes. Lanes are multiples of 128 and sublanes of 8, so
that a head of 40 channels stays 40; channels in lanes would be padded to 128. Scores are [m, n], keys by queries: their
maximum and sum over keys are rows, like all other values of a query.

Tokens that do not fill the lanes are not padded in memory, which would copy every array: the last block reaches beyond
the array, and the kernel masks the arbitrary values there. It takes as many keys as fill sublanes, since keys lie in
the sublanes of the scores.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from diffdis_jax.parallel import sharding
from diffdis_jax.structs import Attended

F32 = jnp.float32
LANES, SUBLANES = 128, 8
LOG2_E = math.log2(math.e)  # the chip has exp2, so that logarithms are to base 2 in this file
# The most scores of one head, and of all heads of one turn: 4 MiB in f32, of which a turn holds about four copies.
MAX_SCORES = 2**20
# The most channels times tokens of a head's keys. Besides the scores, the backward kernel holds about eight such
# arrays (keys, values and their gradients), two of them in f32.
MAX_KEYS = 2**19
VMEM_BYTES = 48 * 2**20
LEAST = -1e30  # the score of a padded key: finite, and its exponential is 0


class Blocks(NamedTuple):
  """The work of one turn of a kernel: a number of heads, a number of queries of each, and all keys."""

  heads: int
  queries: int


def is_possible(n: int, m: int, d: int) -> bool:
  """Return whether the kernel can take n queries and m keys with heads of d channels: all keys must fit on the chip."""
  return n >= 1 and d % SUBLANES == 0 and _filled(m, LANES) * d <= MAX_KEYS and _filled(m, LANES) * LANES <= MAX_SCORES


def choose_blocks(n: int, m: int, h: int) -> Blocks:
  """Return the largest blocks that divide n queries and h heads, within MAX_SCORES scores; n and m are multiples of
  128."""

  def largest(whole: int, unit: int, limit: int) -> int:
    return max(size for size in range(unit, max(min(limit, whole), unit) + 1, unit) if whole % size == 0)

  # Choose the queries first; the number of heads uses the rest of MAX_SCORES.
  queries = largest(n, LANES, MAX_SCORES // m)
  return Blocks(largest(h, 1, MAX_SCORES // (m * queries)), queries)


def attend_with_lse(
  q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], *, interpret: bool = False
) -> Attended:
  """Compute softmax(q k / √d) v, and the logarithm of each softmax's denominator, f32; both have gradients.

  Every device of the mesh for which the code is traced computes its own rows and heads.

  Args:
    interpret: run on any platform, slowly, as the tests do.
  """
  result: Any = _attend(*(rearrange(x, "b n h d -> b h d n") for x in (q, k, v)), interpret)
  out, lse = result
  return Attended(rearrange(out, "b h d n -> b n h d"), rearrange(lse, "b h 1 n -> b n h") / LOG2_E)


class _Out(NamedTuple):
  """The forward kernel's outputs: the result [b, h, d, n], and lse to base 2, f32 [b, h, 1, n]."""

  out: Array
  lse: Array


class Forward(NamedTuple):
  """A forward pass as JAX's custom_vjp needs it: the result, and the arrays that the backward pass gets."""

  result: Any
  kept: tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Array, k: Array, v: Array, interpret: bool) -> _Out:
  return _attend_forward(q, k, v, interpret).result


def _attend_forward(q: Array, k: Array, v: Array, interpret: bool) -> Forward:
  def own(q: Array, k: Array, v: Array) -> _Out:
    # Called here, where shapes are those of one device: blocks must divide its heads, not those of the whole mesh.
    call = _Call(q, k)
    results = call(
      _forward_kernel,
      name="attention",
      inputs=(call.of_queries, call.of_keys, call.of_keys),
      outputs=((call.of_queries, q), (call.of_row, _row_of(q))),
      products=2,
      interpret=interpret,
    )(q, k, v)
    return _Out(*results)

  result = sharding.on_own_heads(own)(q, k, v)
  return Forward(result, (q, k, v, *result))


def _attend_backward(interpret: bool, kept: tuple[Array, ...], gradients: _Out) -> tuple[Array, ...]:
  def own(q: Array, k: Array, v: Array, *rest: Array) -> Any:
    call = _Call(q, k)
    queries, row = call.of_queries, call.of_row
    return call(
      _backward_kernel,
      name="attention_backward",
      inputs=(queries, call.of_keys, call.of_keys, queries, row, queries, row),
      outputs=((queries, q), (call.of_keys, k), (call.of_keys, v)),
      products=5,
      scratch=[pltpu.VMEM((call.heads, k.shape[2], _filled(k.shape[3], SUBLANES)), F32)] * 2,
      interpret=interpret,
    )(q, k, v, *rest)

  return sharding.on_own_heads(own)(*kept, *gradients)


_attend.defvjp(_attend_forward, _attend_backward)


class _Call:
  """The grid and the blocks of both kernels: batch, groups of heads, blocks of queries. Keys are never split."""

  def __init__(self, q: Array, k: Array):
    b, h, d, n = q.shape
    in_lanes, m = (_filled(tokens, LANES) for tokens in (n, k.shape[3]))
    heads, queries = choose_blocks(in_lanes, m, h)
    self.heads = heads
    # Blocks of queries are the last axis, the innermost loop: the keys stay on the chip meanwhile.
    self.grid = (b, h // heads, in_lanes // queries)
    self.of_queries = pl.BlockSpec((1, heads, d, queries), lambda i, j, at: (i, j, 0, at))
    self.of_keys = pl.BlockSpec((1, heads, d, m), lambda i, j, at: (i, j, 0, 0))
    self.of_row = pl.BlockSpec((1, heads, 1, queries), lambda i, j, at: (i, j, 0, at))
    self._scores, self._d = b * h * in_lanes * _filled(k.shape[3], SUBLANES), d
    self._options = dict(scale=1.0 / math.sqrt(d), num_queries=n, num_keys=k.shape[3])

  def __call__(
    self,
    kernel: Any,
    *,
    name: str,
    inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
    products: int,
    interpret: bool,
    scratch: Any = (),
  ) -> Any:
    """Return the kernel as a function of arrays; `outputs` are pairs of a block and an array of the result's
    shape."""
    shapes = [jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs]

    def called(*arrays: Array) -> Any:
      cost = pl.CostEstimate(
        flops=2 * products * self._scores * self._d,
        transcendentals=self._scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
      )
      return pl.pallas_call(
        functools.partial(kernel, **self._options),
        grid=self.grid,
        in_specs=inputs,
        out_specs=[block for block, _ in outputs],
        out_shape=shapes,
        scratch_shapes=scratch,
        # Gradients of keys and values are summed over the blocks of queries, which are thus computed in sequence.
        compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
      )(*arrays)

    return called


def _forward_kernel(
  q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, lse_ref: Any, *, scale: float, num_queries: int, num_keys: int
):
  """Write one block's result and lse. All refs are [1, heads, channels, tokens]. Queries beyond the last one do not
  affect the others."""
  del num_queries
  for head in range(q_ref.shape[1]):
    v = _keys(num_keys, v_ref, head)
    products = _products(q_ref[0, head], _keys(num_keys, k_ref, head), num_keys)
    # Subtract the largest score, which cancels in the quotient, so that no exponential overflows.
    top = products.max(axis=0, keepdims=True)
    weights = jnp.exp2((products - top) * (scale * LOG2_E)).astype(v.dtype)
    # Rows of ones below v make the product also sum the weights.
    with_ones = jnp.concatenate([v, jnp.ones((SUBLANES, v.shape[1]), v.dtype)], axis=0)
    sums = _dot(with_ones, weights, 1, 0)
    total = sums[v.shape[0] : v.shape[0] + 1]
    o_ref[0, head] = (sums[: v.shape[0]] / total).astype(o_ref.dtype)
    lse_ref[0, head] = top * (scale * LOG2_E) + jnp.log2(total)


def _backward_kernel(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  o_ref: Any,
  lse_ref: Any,
  g_ref: Any,
  g_lse_ref: Any,
  of_q_ref: Any,
  of_k_ref: Any,
  of_v_ref: Any,
  sum_k_ref: Any,
  sum_v_ref: Any,
  *,
  scale: float,
  num_queries: int,
  num_keys: int,
):
  """Write one block's gradients. The weights w are computed again from scores and lse. The derivative of softmax is
  w (g·v - g·out), and w for lse, here to base 2."""
  block = pl.program_id(2)
  first = block * q_ref.shape[3]

  @pl.when(block == 0)
  def _():
    sum_k_ref[...] = jnp.zeros_like(sum_k_ref)
    sum_v_ref[...] = jnp.zeros_like(sum_v_ref)

  for head in range(q_ref.shape[1]):
    # Set the values of queries beyond the last one to 0, so that they add 0 to the gradients of keys and values.
    q, g, o, lse, g_lse = (
      _up_to(num_queries, ref[0, head], first) for ref in (q_ref, g_ref, o_ref, lse_ref, g_lse_ref)
    )
    k, v = (_keys(num_keys, ref, head) for ref in (k_ref, v_ref))
    weights = jnp.exp2(_products(q, k, num_keys) * (scale * LOG2_E) - lse)
    mean = jnp.sum(g.astype(F32) * o.astype(F32), axis=0, keepdims=True)
    of_scores = (weights * (_dot(v, g, 0, 0) - (mean - g_lse * LOG2_E))).astype(q.dtype)
    of_q_ref[0, head] = (_dot(k, of_scores, 1, 0) * scale).astype(of_q_ref.dtype)
    sum_k_ref[head] += _dot(q, of_scores, 1, 1)
    sum_v_ref[head] += _dot(g, weights.astype(v.dtype), 1, 1)

  @pl.when(block == pl.num_programs(2) - 1)
  def _():
    taken = sum_k_ref.shape[2]
    of_k_ref[0, :, :, :taken] = (sum_k_ref[...] * scale).astype(of_k_ref.dtype)
    of_v_ref[0, :, :, :taken] = sum_v_ref[...].astype(of_v_ref.dtype)


def _keys(num_keys: int, ref: Any, head: int) -> Array:
  """Return this head's keys or values, [d, m], as many as fill sublanes."""
  return _up_to(num_keys, ref[0, head, :, : _filled(num_keys, SUBLANES)])


def _up_to(count: int, x: Array, first: Any = 0) -> Array:
  """Return x [d, tokens], whose first token has the number `first`, with zeros from token number `count` on."""
  if count % x.shape[1] == 0:  # all blocks are full
    return x
  numbers = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where(numbers < count, x, jnp.zeros_like(x))


def _products(q: Array, k: Array, num_keys: int) -> Array:
  """Compute the scores without their scale, f32 [m, n], which is applied in f32. Scaling queries in bf16 would round
  once more: a score of 60 would be off by 0.1. Scaling scores moves nothing through memory, since they never leave the
  chip. It takes one multiplication a score: by the compiler's schedules 3 % more cycles forwards at 1024 keys, less for
  fewer keys, and none backwards."""
  products = _dot(k, q, 0, 0)
  if num_keys == k.shape[1]:
    return products
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, products.shape, 0) < num_keys, products, LEAST)


def _dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
  """Compute the f32 product of two matrices over these axes. Kernels have no precision `high`, only `default` and
  `highest`."""
  config: Any = jax.config
  precision = jax.lax.Precision.HIGHEST if config.jax_default_matmul_precision == "high" else None
  contracted = (((of_a,), (of_b,)), ((), ()))
  return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=F32)


def _row_of(q: Array) -> jax.ShapeDtypeStruct:
  b, h, _, n = q.shape
  return jax.ShapeDtypeStruct((b, h, 1, n), F32)


def _filled(tokens: int, unit: int) -> int:
  """Round a number of tokens up to a multiple of `unit`."""
  return -(-tokens // unit) * unit
