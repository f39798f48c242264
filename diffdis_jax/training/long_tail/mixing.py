"""Mix a batch by Mixup or CutMix with itself backwards, as VL-LTR takes them from timm: one random choice a batch.

Rows are mixed with those of the global batch, whatever the number of devices; VL-LTR's partners are of one process.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from diffdis_jax.structs import AnyArray


@struct.dataclass
class Mix:
  """The random choice by which a batch is mixed.

  `share` is λ, a row's own part; with CutMix that of the pixels outside of the box. The box holds rows top ... bottom-1
  and columns left ... right-1.
  """

  share: Float[AnyArray, ""]
  is_cutmix: Bool[AnyArray, ""]
  top: Int[AnyArray, ""]
  bottom: Int[AnyArray, ""]
  left: Int[AnyArray, ""]
  right: Int[AnyArray, ""]


def draw_mix(key: PRNGKeyArray, *, size: int, mixup: float, cutmix: float, cutmix_share: float) -> Mix:
  """Sample λ ~ Beta(a, a), a of mixup or of CutMix; and a box of 1 − λ of the area around a uniform pixel, cut to it.

  Args:
    size: side of the images, pixels.
    mixup, cutmix: a of each; 0 leaves it out, and with both 0 nothing is mixed.
    cutmix_share: how often it is CutMix where both are there.
  """
  # Each choice has its key, whichever of them are made.
  which, of_mixup, of_cutmix, row, column = jax.random.split(key, 5)
  if mixup and cutmix:
    is_cutmix = jax.random.bernoulli(which, cutmix_share)
  else:
    is_cutmix = jnp.asarray(bool(cutmix))

  def beta(key: PRNGKeyArray, a: float) -> Float[Array, ""]:
    return jax.random.beta(key, a, a) if a else jnp.ones(())  # Beta(0, 0) is none; with λ = 1 an image stays itself

  share = jnp.where(is_cutmix, beta(of_cutmix, cutmix), beta(of_mixup, mixup))
  centre = jax.random.randint(row, (), 0, size), jax.random.randint(column, (), 0, size)
  return boxed(share, is_cutmix, *centre, size=size)


def boxed(
  share: Float[Array, ""], is_cutmix: Bool[Array, ""], row: Int[Array, ""], column: Int[Array, ""], *, size: int
) -> Mix:
  """Return the mix of λ and a box around this pixel; λ of CutMix is then what the box, cut to the image, leaves."""
  # As timm halves it: sides are even, and the box is a little smaller than 1 − λ asks for.
  half = jnp.floor(size * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
  edges = [jnp.clip(edge, 0, size) for edge in (row - half, row + half, column - half, column + half)]
  top, bottom, left, right = edges
  outside = 1.0 - ((bottom - top) * (right - left)).astype(jnp.float32) / (size * size)
  # timm's correct_lam: targets are mixed as the pixels were.
  return Mix(jnp.where(is_cutmix, outside, share), is_cutmix, top, bottom, left, right)


def mix_images(images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"], mix: Mix) -> Float[Array, "b h w 3"]:
  """Mix each image with that of the row as far from the other end of the batch; f32, of the same range."""
  own = images.astype(jnp.float32)
  other = own[::-1]
  rows, columns = (jnp.arange(side) for side in own.shape[1:3])
  inside = ((rows >= mix.top) & (rows < mix.bottom))[:, None] & ((columns >= mix.left) & (columns < mix.right))
  cut = jnp.where(inside[None, :, :, None], other, own)
  # Both are computed, and one taken: which, is known on the device alone.
  return jnp.where(mix.is_cutmix, cut, mix.share * own + (1.0 - mix.share) * other)


def mix_targets(labels: Int[Array, "b"], mix: Mix, *, classes: int, smoothing: float) -> Float[Array, "b k"]:
  """Return λ of a row's own class and 1 − λ of its partner's, with `smoothing` of each spread over all classes."""
  own = (1.0 - smoothing) * jax.nn.one_hot(labels, classes, dtype=jnp.float32) + smoothing / classes
  return mix.share * own + (1.0 - mix.share) * own[::-1]
