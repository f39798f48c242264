"""A small classifier of rendered shapes, which judges generated ones, and its training.

It shares nothing with the model that it judges: neither weights nor layers. It is not the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.data import shapes
from diffdis_jax.evals import base

SIZE = 32  # pixels: a classifier sees every image at this size
COLOURS = tuple(shapes.COLOURS)
PAIRS = np.array([(COLOURS.index(colour), shapes.SHAPES.index(shape)) for colour, shape in shapes.PAIRS])
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Trained:
  """A classifier, and its accuracy on real images that it was not trained on, by metric."""

  model: Any
  accuracy: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Examples:
  """A batch to train on: images and, for each, the number of its class, or of its colour and its shape."""

  images: UInt8[np.ndarray, "b s s 3"]
  targets: Int[np.ndarray, "b *k"]


def fit(
  model: nnx.Module,
  optimizer: optax.GradientTransformation,
  loss: Callable[[Any, Array, Array], Array],
  batches: Iterable[Examples],
) -> None:
  """Train a classifier in place: loss(model, images, targets), one step a batch."""
  state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

  @nnx.jit
  def step(model: Any, state: nnx.Optimizer, images: Array, targets: Array) -> None:
    grads = nnx.grad(loss)(model, images, targets)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
      state.update(model, grads)

  for batch in batches:
    step(model, state, jnp.asarray(batch.images), jnp.asarray(batch.targets))


def apply(
  f: Callable[[Any, Array], Array], model: Any, images: UInt8[np.ndarray, "n s s 3"], *, batch_size: int
) -> Any:
  """Return f(model, images) of all images."""
  # The network is an argument: weights that are closed over would be constants of the program.
  compiled = nnx.jit(f)
  return base.by_blocks(lambda rows: compiled(model, jnp.asarray(rows)), images, size=batch_size)


class ShapeLogits(struct.PyTreeNode):
  """The logits that a classifier of rendered shapes gives each image, for the colour and for the shape."""

  colour: Float[Array, "b c"]
  shape: Float[Array, "b k"]


def with_contrast(image: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 4"]:
  """Return the image from -1 to 1, and how much each of its pixels differs from the border's median, from -1 to 1."""
  x = image.astype(jnp.float32) / 127.5 - 1
  # A shape of nearly the background's colour is as visible in this channel as any other: it is scaled to the largest
  # difference of its own image.
  border = jnp.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], axis=1)
  contrast = jnp.abs(x - jnp.median(border, axis=1)[:, None, None]).sum(-1, keepdims=True)
  return jnp.concatenate([x, 2 * contrast / (contrast.max((1, 2), keepdims=True) + 1e-3) - 1], axis=-1)


class ShapeClassifier(nnx.Module):
  """Three convolutions, pooling and two heads.

  Besides the pixels it sees how much each of them differs from the background, which is taken from the border.
  """

  def __init__(self, *, rngs: nnx.Rngs, widths: Sequence[int] = (24, 48, 96)):
    first, second, third = widths
    self.convs = nnx.List(
      [
        nnx.Conv(4, first, (5, 5), strides=2, rngs=rngs),
        nnx.Conv(first, second, (3, 3), strides=2, rngs=rngs),
        nnx.Conv(second, third, (3, 3), rngs=rngs),
      ]
    )
    self.norms = nnx.List([nnx.GroupNorm(width, num_groups=8, rngs=rngs) for width in widths])
    self.colour = nnx.Linear(2 * third, len(COLOURS), rngs=rngs)
    self.shape = nnx.Linear(2 * third, len(shapes.SHAPES), rngs=rngs)

  def __call__(self, image: UInt8[Array, "b h w 3"]) -> ShapeLogits:
    x = with_contrast(image)
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
    # The mean tells the colour, whatever the place; the maximum tells a corner, however small.
    pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1)
    return ShapeLogits(colour=self.colour(pooled), shape=self.shape(pooled))


def render(*, image_size: int, num_images: int, seed: int) -> UInt8[np.ndarray, "n s s 3"]:
  """Return real images of all the classes in turn, rendered at the generator's size and then brought to the judge's."""
  source = shapes.Shapes(split="all", image_size=image_size, seed=seed, num_images=num_images)
  return np.stack([base.to_square(source[i]["image"], SIZE) for i in range(num_images)])


def train_on_shapes(
  *, image_size: int, seed: int, num_steps: int, batch_size: int = 64, num_images: int = 8192
) -> ShapeClassifier:
  """Train on `num_images` renders by Adam under a cosine schedule."""
  images = render(image_size=image_size, num_images=num_images, seed=seed)
  targets = PAIRS[np.arange(num_images) % len(PAIRS)]
  model, rng = ShapeClassifier(rngs=nnx.Rngs(seed)), np.random.default_rng(seed)

  def loss(model: ShapeClassifier, image: Array, target: Int[Array, "b 2"]) -> Array:
    logits = model(image)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits.colour, target[:, 0]).mean() + cross_entropy(logits.shape, target[:, 1]).mean()

  # Rows are drawn with replacement, so that the number of steps is free of the number of renders.
  drawn = (rng.integers(num_images, size=batch_size) for _ in range(num_steps))
  schedule = optax.cosine_decay_schedule(4e-3, num_steps)
  fit(model, optax.adam(schedule), loss, (Examples(images[rows], targets[rows]) for rows in drawn))
  return model


def pairs_of(model: ShapeClassifier, images: UInt8[np.ndarray, "n s s 3"]) -> Int[np.ndarray, "n 2"]:
  """Return the colour's and the shape's number, as the classifier sees them."""

  def named(model: ShapeClassifier, image: Array) -> Int[Array, "b 2"]:
    logits = model(image)
    return jnp.stack([logits.colour.argmax(-1), logits.shape.argmax(-1)], axis=-1)

  return apply(named, model, images, batch_size=256)
