"""The Inception network whose features FID and KID compare, for inference only.

It is TensorFlow's graph of 2015-12-05, not the Inception v3 of torchvision or Keras: average pools leave the padding
out of the mean, the last block has a max pool instead of one, and there are 1008 classes. Convolutions have no bias,
and their norms an eps of 1e-3. Names are those of torch-fidelity's and pytorch-fid's weights, in lower case.

All is computed in f32 with the highest precision of products: with a TPU's default of bf16 the features would differ.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

SIDE = 299  # the side of an image in pixels
WIDTH = 2048  # the number of features for FID
EPS = 1e-3
CLASSES = 1008  # of the classifier after the features, which FID does not use


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """Pool by the maximum, 3 x 3 with stride 2, without padding."""
  return nnx.max_pool(x, (3, 3), strides=(2, 2))


def max_pool_same(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Pool by the maximum, 3 x 3 with stride 1, over the part of each window that lies in the image."""
  return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Pool by the mean, 3 x 3 with stride 1, over the part of each window that lies in the image."""
  return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


class ConvNorm(nnx.Module):
  """Convolution, batch norm by stored statistics, and ReLU. `same` pads so that stride 1 keeps the size."""

  def __init__(self, din: int, dout: int, size: tuple[int, int], *, stride: int = 1, same: bool = True, rngs: nnx.Rngs):
    """Make the layers. `size` is the kernel's height and width."""
    # The padding is explicit: with stride 2, "SAME" would pad on one side only.
    padding = tuple((side // 2, side // 2) for side in size) if same else "VALID"
    self.conv = nnx.Conv(
      din, dout, size, strides=stride, padding=padding, use_bias=False, precision=jax.lax.Precision.HIGHEST, rngs=rngs
    )
    # Stored statistics: with those of the batch, an image's features would depend on the other images.
    self.bn: Any = nnx.BatchNorm(dout, use_running_average=True, epsilon=EPS, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    return nnx.relu(self.bn(self.conv(x)))


def side_by_side(*branches: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
  """Concatenate maps along the channels."""
  return jnp.concatenate(branches, axis=-1)


class BlockA(nnx.Module):
  """A block on maps of 35 x 35; `pool` is the number of channels of the pooled branch."""

  def __init__(self, din: int, *, pool: int, rngs: nnx.Rngs):
    conv = functools.partial(ConvNorm, rngs=rngs)
    self.branch1x1 = conv(din, 64, (1, 1))
    self.branch5x5_1 = conv(din, 48, (1, 1))
    self.branch5x5_2 = conv(48, 64, (5, 5))
    self.branch3x3dbl_1 = conv(din, 64, (1, 1))
    self.branch3x3dbl_2 = conv(64, 96, (3, 3))
    self.branch3x3dbl_3 = conv(96, 96, (3, 3))
    self.branch_pool = conv(din, pool, (1, 1))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    return side_by_side(
      self.branch1x1(x),
      self.branch5x5_2(self.branch5x5_1(x)),
      self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
      self.branch_pool(average_pool(x)),
    )


class BlockB(nnx.Module):
  """The block that reduces maps from 35 x 35 to 17 x 17."""

  def __init__(self, din: int, *, rngs: nnx.Rngs):
    conv = functools.partial(ConvNorm, rngs=rngs)
    self.branch3x3 = conv(din, 384, (3, 3), stride=2, same=False)
    self.branch3x3dbl_1 = conv(din, 64, (1, 1))
    self.branch3x3dbl_2 = conv(64, 96, (3, 3))
    self.branch3x3dbl_3 = conv(96, 96, (3, 3), stride=2, same=False)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    return side_by_side(
      self.branch3x3(x),
      self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
      max_pool(x),
    )


class BlockC(nnx.Module):
  """A block on maps of 17 x 17; `width` is the number of channels between its long kernels."""

  def __init__(self, din: int, *, width: int, rngs: nnx.Rngs):
    conv = functools.partial(ConvNorm, rngs=rngs)
    self.branch1x1 = conv(din, 192, (1, 1))
    self.branch7x7_1 = conv(din, width, (1, 1))
    self.branch7x7_2 = conv(width, width, (1, 7))
    self.branch7x7_3 = conv(width, 192, (7, 1))
    self.branch7x7dbl_1 = conv(din, width, (1, 1))
    self.branch7x7dbl_2 = conv(width, width, (7, 1))
    self.branch7x7dbl_3 = conv(width, width, (1, 7))
    self.branch7x7dbl_4 = conv(width, width, (7, 1))
    self.branch7x7dbl_5 = conv(width, 192, (1, 7))
    self.branch_pool = conv(din, 192, (1, 1))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
    return side_by_side(
      self.branch1x1(x),
      self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
      self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
      self.branch_pool(average_pool(x)),
    )


class BlockD(nnx.Module):
  """The block that reduces maps from 17 x 17 to 8 x 8."""

  def __init__(self, din: int, *, rngs: nnx.Rngs):
    conv = functools.partial(ConvNorm, rngs=rngs)
    self.branch3x3_1 = conv(din, 192, (1, 1))
    self.branch3x3_2 = conv(192, 320, (3, 3), stride=2, same=False)
    self.branch7x7x3_1 = conv(din, 192, (1, 1))
    self.branch7x7x3_2 = conv(192, 192, (1, 7))
    self.branch7x7x3_3 = conv(192, 192, (7, 1))
    self.branch7x7x3_4 = conv(192, 192, (3, 3), stride=2, same=False)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    return side_by_side(
      self.branch3x3_2(self.branch3x3_1(x)),
      self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
      max_pool(x),
    )


class BlockE(nnx.Module):
  """A block on maps of 8 x 8; the last one pools by the maximum."""

  def __init__(self, din: int, *, last: bool, rngs: nnx.Rngs):
    conv = functools.partial(ConvNorm, rngs=rngs)
    self.last = last
    self.branch1x1 = conv(din, 320, (1, 1))
    self.branch3x3_1 = conv(din, 384, (1, 1))
    self.branch3x3_2a = conv(384, 384, (1, 3))
    self.branch3x3_2b = conv(384, 384, (3, 1))
    self.branch3x3dbl_1 = conv(din, 448, (1, 1))
    self.branch3x3dbl_2 = conv(448, 384, (3, 3))
    self.branch3x3dbl_3a = conv(384, 384, (1, 3))
    self.branch3x3dbl_3b = conv(384, 384, (3, 1))
    self.branch_pool = conv(din, 192, (1, 1))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    single = self.branch3x3_1(x)
    double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return side_by_side(
      self.branch1x1(x),
      self.branch3x3_2a(single),
      self.branch3x3_2b(single),
      self.branch3x3dbl_3a(double),
      self.branch3x3dbl_3b(double),
      self.branch_pool(max_pool_same(x) if self.last else average_pool(x)),
    )


class Inception(nnx.Module):
  """The whole network, with 21,785,568 parameters without the norms' statistics."""

  def __init__(self, *, rngs: nnx.Rngs):
    conv = functools.partial(ConvNorm, rngs=rngs)
    self.conv2d_1a_3x3 = conv(3, 32, (3, 3), stride=2, same=False)
    self.conv2d_2a_3x3 = conv(32, 32, (3, 3), same=False)
    self.conv2d_2b_3x3 = conv(32, 64, (3, 3))
    self.conv2d_3b_1x1 = conv(64, 80, (1, 1))
    self.conv2d_4a_3x3 = conv(80, 192, (3, 3), same=False)
    self.mixed_5b = BlockA(192, pool=32, rngs=rngs)
    self.mixed_5c = BlockA(256, pool=64, rngs=rngs)
    self.mixed_5d = BlockA(288, pool=64, rngs=rngs)
    self.mixed_6a = BlockB(288, rngs=rngs)
    self.mixed_6b = BlockC(768, width=128, rngs=rngs)
    self.mixed_6c = BlockC(768, width=160, rngs=rngs)
    self.mixed_6d = BlockC(768, width=160, rngs=rngs)
    self.mixed_6e = BlockC(768, width=192, rngs=rngs)
    self.mixed_7a = BlockD(768, rngs=rngs)
    self.mixed_7b = BlockE(1280, last=False, rngs=rngs)
    self.mixed_7c = BlockE(2048, last=True, rngs=rngs)

  def __call__(self, x: Float[Array, "b 299 299 3"]) -> Float[Array, "b 2048"]:
    """Return the features of images, f32. Pixels are given as (value - 128) / 128."""
    x = max_pool(self.conv2d_2b_3x3(self.conv2d_2a_3x3(self.conv2d_1a_3x3(x))))
    x = max_pool(self.conv2d_4a_3x3(self.conv2d_3b_1x1(x)))
    x = self.mixed_6a(self.mixed_5d(self.mixed_5c(self.mixed_5b(x))))
    x = self.mixed_6e(self.mixed_6d(self.mixed_6c(self.mixed_6b(x))))
    x = self.mixed_7c(self.mixed_7b(self.mixed_7a(x)))
    # The mean over positions, like the original's average pool over the whole map.
    return x.mean(axis=(1, 2))
