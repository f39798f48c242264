"""Compare the compiler's estimates of plain programs with the least time that a chip's peak figures allow.

A large product of matrices runs close to the peak on any TPU, and a sum of two arrays close to the memory's bandwidth.
So an estimate of these says how an estimate of a training step is to be read. The smaller ones are layers of Stable
Diffusion's UNet for 16 images of 256 px.

  python -m tests.preflight.calibration v5p:2x2x1
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array

from diffdis_jax.errors import UserError
from diffdis_jax.preflight import chips, flops, targets

ESTIMATES = {"seconds": "its sum", "seconds_by_cycles": "by cycles"}


class Costs(NamedTuple):
  """A lowered program, its floating-point operations, and the bytes that it reads and writes at least."""

  lowered: jax.stages.Lowered
  flops: float
  moved: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
  """A function of arrays that is one operation of the chip.

  Attributes:
    shapes: of its arguments.
    dtype: of all of them, and of its result.
  """

  f: Callable[..., Array]
  shapes: tuple[tuple[int, ...], ...]
  dtype: Any = jnp.bfloat16

  def lower(self, device: Any) -> Costs:
    """For this device."""
    place = jax.sharding.SingleDeviceSharding(device)
    traced = jax.jit(self.f).trace(*(jax.ShapeDtypeStruct(s, self.dtype, sharding=place) for s in self.shapes))
    # Each argument and result once: what the compiler reads again is its own doing.
    arrays = [*self.shapes, *(each.shape for each in jax.tree.leaves(traced.out_info))]
    moved = sum(map(math.prod, arrays)) * jnp.dtype(self.dtype).itemsize
    return Costs(traced.lower(), flops.count(traced.jaxpr), moved)


def _product(rows: int, inner: int, columns: int) -> Plain:
  return Plain(f=lambda x, w: x @ w, shapes=((rows, inner), (inner, columns)))


def _convolve(x: Array, kernel: Array) -> Array:
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolution(side: int, channels: int) -> Plain:
  return Plain(f=_convolve, shapes=((16, side, side, channels), (3, 3, channels, channels)))


def _gradient_of_kernel(side: int, channels: int) -> Plain:
  image, kernel = (16, side, side, channels), jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.bfloat16)

  # The transpose alone, so that nothing but one operation is in the program.
  def gradient(x: Array, dy: Array) -> Array:
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel), kernel)(dy)[0]

  return Plain(f=gradient, shapes=(image, image))


def _sum(dtype: Any) -> Plain:
  return Plain(f=lambda x, y: x + y, shapes=((2**13, 2**13),) * 2, dtype=dtype)


# The first is bound by operations alone and the sums by memory alone: they say how the estimate errs at either bound.
# The others are what a UNet's step is made of.
PROGRAMS = {
  "product 8192 x 8192 x 8192": _product(8192, 8192, 8192),
  "product 16384 x 320 x 320": _product(16384, 320, 320),
  "product 16384 x 320 x 2560": _product(16384, 320, 2560),
  "product 1024 x 1280 x 1280": _product(1024, 1280, 1280),
  "convolution 3 x 3, 32 x 32, 320 channels": _convolution(32, 320),
  "convolution 3 x 3, 16 x 16, 640 channels": _convolution(16, 640),
  "convolution 3 x 3, 8 x 8, 1280 channels": _convolution(8, 1280),
  "gradient of the first one's kernel": _gradient_of_kernel(32, 320),
  "gradient of the last one's kernel": _gradient_of_kernel(8, 1280),
  "sum of 64 Mi numbers, bf16": _sum(jnp.bfloat16),
  "sum of 64 Mi numbers, f32": _sum(jnp.float32),
}


def calibrate(target: targets.Target) -> dict[str, dict[str, float | None]]:
  """Of each of PROGRAMS on one chip: `seconds_least`, the longer of its operations at the chip's peak and its bytes at
  the memory's bandwidth, and each of ESTIMATES in seconds, None where the compiler has none.

  Raises:
    UserError: the compiler estimates no time.
  """
  if target.compiler != "tpu":
    raise UserError(f"the compiler for {target.chip.kind} here, {target.compiler}, estimates no time; only TPUs' does")
  results = {}
  for name, program in PROGRAMS.items():
    costs = program.lower(target.devices[0])
    compiled = targets.compile(costs.lowered, target)
    # The longer of the two, as if one ran entirely beside the other: no program can be faster.
    least = max(costs.flops / target.chip.flops, costs.moved / target.chip.bandwidth)
    results[name] = {"seconds_least": least} | {each: getattr(compiled, each) for each in ESTIMATES}
    logging.info("%s", line(name, results[name]))
  return results


def line(name: str, result: dict[str, float | None]) -> str:
  """ "product 8192 x 8192 x 8192: at least 2.396 ms; its sum 1.17, by cycles 1.20 times that"."""
  least = result["seconds_least"]
  assert least
  return f"{name}: at least {1e3 * least:.3f} ms; {', '.join(_ratios(result, least))} times that"


def _ratios(result: dict[str, float | None], least: float) -> Iterator[str]:
  for key, by in ESTIMATES.items():
    seconds = result[key]
    yield f"{by} {'none' if seconds is None else f'{seconds / least:.2f}'}"


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  topology = chips.parse(sys.argv[1])
  targets.prepare("tpu", topology, 1)
  calibrate(targets.find("tpu", topology, 1))
