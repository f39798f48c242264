"""Train a judge that names both shapes of a rendered scene and their relation, on renders of any two pairs.

It shares nothing with the model that it judges, and its renders are not that model's images. It is not in the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from diffdis_jax.data import shapes, sources
from diffdis_jax.evals import base, generation_accuracy
from diffdis_jax.evals.generation_accuracy import COLOURS, SIZE, Examples, Trained, require
from replication import scenes

# The attributes of a scene: the relation, then those of its first shape, then those of its second.
ATTRIBUTES = ("relation", "colour", "shape", "colour", "shape")
CROSSWISE = [0, 3, 4, 1, 2]  # the same attributes with the two shapes swapped
NUM_RENDERS, NUM_MEASURED = 8192, 2048
PEAK_RATE = 3e-3


class SceneLogits(struct.PyTreeNode):
  """The logits of each image; the four halves are left, right, top and bottom."""

  relation: Float[Array, "b r"]
  colour: Float[Array, "b 4 c"]
  shape: Float[Array, "b 4 k"]


class SceneClassifier(nnx.Module):
  """Four convolutions; in each half of their feature map, heads that all halves share name one shape."""

  def __init__(self, *, rngs: nnx.Rngs, widths: Sequence[int] = (24, 48, 96, 96)):
    self.convs = nnx.List(
      nnx.Conv(a, b, (5, 5) if i == 0 else (3, 3), strides=stride, rngs=rngs)
      for i, (a, b, stride) in enumerate(zip((4, *widths[:-1]), widths, (2, 1, 2, 1), strict=True))
    )
    self.norms = nnx.List(nnx.GroupNorm(width, num_groups=8, rngs=rngs) for width in widths)
    self.relation = nnx.Linear(16 * widths[-1], len(scenes.RELATIONS), rngs=rngs)
    self.colour = nnx.Linear(2 * widths[-1], len(COLOURS), rngs=rngs)
    self.shape = nnx.Linear(2 * widths[-1], len(shapes.SHAPES), rngs=rngs)

  def __call__(self, image: UInt8[Array, "b h w 3"]) -> SceneLogits:
    x = generation_accuracy.with_contrast(image)
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
    b, h, w, c = x.shape
    halves = jnp.stack(
      [x[:, :, : w // 2], x[:, :, w // 2 :], *(jnp.swapaxes(part, 1, 2) for part in jnp.split(x, 2, 1))], 1
    )
    pooled = jnp.concatenate([halves.mean((2, 3)), halves.max((2, 3))], axis=-1)
    grid = x.reshape(b, 4, h // 4, 4, w // 4, c).mean((2, 4)).reshape(b, -1)
    return SceneLogits(relation=self.relation(grid), colour=self.colour(pooled), shape=self.shape(pooled))


def attributes_of(scene: scenes.Scene) -> tuple[int, ...]:
  """Return a scene's attributes as numbers, in the order of ATTRIBUTES."""
  pairs = (scene.first, scene.second)
  named = (number for colour, shape in pairs for number in (COLOURS.index(colour), shapes.SHAPES.index(shape)))
  return (scenes.RELATIONS.index(scene.relation), *named)


def render(*, image_size: int, num_images: int, seed: int) -> Examples:
  """Return real images, rendered at the generator's size and resized to the judge's, and their attributes [n, 5]."""
  source = scenes.Scenes(split="all", image_size=image_size, seed=seed, num_images=num_images)
  images = np.stack([base.to_square(source[i]["image"], SIZE) for i in range(num_images)])
  return Examples(images, np.array([attributes_of(source.scene(i)) for i in range(num_images)]))


@functools.cache
def train(*, image_size: int, seed: int, num_steps: int) -> Trained:
  """Train the judge for images of this size, once in a process, by Adam under a cosine schedule.

  Its accuracy, judge_acc1, is the share of new renders on which all five attributes are right.
  """
  examples = render(image_size=image_size, num_images=NUM_RENDERS, seed=seed)
  model, rng = SceneClassifier(rngs=nnx.Rngs(seed)), np.random.default_rng(seed)

  def loss(model: SceneClassifier, image: Array, target: Int[Array, "b 5"]) -> Array:
    logits, cross_entropy = model(image), optax.softmax_cross_entropy_with_integer_labels
    # Only the halves along the true relation show one shape each: left and right, or top and bottom.
    rows, first = jnp.arange(len(target)), 2 * target[:, 0]
    total = cross_entropy(logits.relation, target[:, 0])
    for place in (0, 1):
      total += cross_entropy(logits.colour[rows, first + place], target[:, 1 + 2 * place])
      total += cross_entropy(logits.shape[rows, first + place], target[:, 2 + 2 * place])
    return total.mean()

  batches_of_rows = (rng.integers(NUM_RENDERS, size=generation_accuracy.BATCH) for _ in range(num_steps))
  schedule = optax.cosine_onecycle_schedule(num_steps, PEAK_RATE)
  batches = (Examples(examples.images[rows], examples.targets[rows]) for rows in batches_of_rows)
  generation_accuracy.fit(model, optax.adam(schedule), loss, batches)
  fresh = render(image_size=image_size, num_images=NUM_MEASURED, seed=seed + 1)
  accuracy = float((attributes(model, fresh.images) == fresh.targets).all(axis=1).mean())
  return Trained(model, {"judge_acc1": accuracy})


def attributes(model: SceneClassifier, images: UInt8[np.ndarray, "n s s 3"]) -> Int[np.ndarray, "n 5"]:
  """Return the attributes that the classifier names, as numbers in the order of ATTRIBUTES."""

  def named(model: SceneClassifier, image: Array) -> Int[Array, "b 5"]:
    logits = model(image)
    relation, colour, shape = (head.argmax(-1) for head in (logits.relation, logits.colour, logits.shape))
    rows = jnp.arange(len(relation))
    at = lambda named, place: named[rows, 2 * relation + place]
    return jnp.stack([relation, at(colour, 0), at(shape, 0), at(colour, 1), at(shape, 1)], axis=-1)

  return generation_accuracy.apply(named, model, images, batch_size=256)


def right(named: Int[np.ndarray, "n 5"], prompted: Int[np.ndarray, "n 5"]) -> Bool[np.ndarray, "n 5"]:
  """Return which attributes are correct.

  The two shapes are compared in the prompt's order, or swapped if more attributes are correct that way. In a swapped
  scene the relation is wrong.
  """
  straight, crosswise = named == prompted, named[:, CROSSWISE] == prompted
  crosswise[:, 0] = False
  return np.where((crosswise.sum(axis=1) > straight.sum(axis=1))[:, None], crosswise, straight)


def _scene(record: Mapping[str, Any]) -> scenes.Scene:
  first, second = (shapes.PAIRS[shapes.CLASSNAMES.index(record[name])] for name in ("first", "second"))
  return scenes.Scene(first, second, record["relation"])


class SceneJudge:
  """A judge of images that were generated for the captions of a split of scenes, for `GenerationAccuracy`.

  Args:
    data: the config section of a data source of scenes.
    seed: seed of the classifier.
    classifier_steps: steps of the classifier's training.
    required_accuracy: accuracy that the classifier must reach on new renders.
  """

  template, per_class = "{}", 1

  def __init__(
    self, data: Mapping[str, Any], seed: int, *, classifier_steps: int = 400, required_accuracy: float = 0.98
  ):
    source = sources.open_source(**data)
    records = [base.fields(source, i) for i in range(len(source))]
    self.classnames = tuple(record["caption"] for record in records)
    self.asked = np.arange(len(records))
    self._targets = np.array([attributes_of(_scene(record)) for record in records])
    self._split = data.get("split", "train")
    self._seed, self._steps, self._required = seed, classifier_steps, required_accuracy

  def protocol(self) -> dict[str, Any]:
    """Return the settings of the classifier's training, and of the data whose captions it judges."""
    return {"steps": self._steps, "split": self._split}

  def train(self, image_size: int) -> Trained:
    """Train the judge for generated images of this size. Raises UserError if its accuracy is below the required one."""
    trained = train(image_size=image_size, seed=self._seed, num_steps=self._steps)
    require(trained, self._required, self._steps)
    return trained

  def measure(
    self, images: UInt8[np.ndarray, "n h w 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    """Return acc1, the share of images with all five attributes correct; acc1_attributes, the share of correct
    attributes; and acc1_relation, acc1_colour and acc1_shape."""
    trained = self.train(image_size)
    squares = np.stack([base.to_square(image, SIZE) for image in images])
    correct = right(attributes(trained.model, squares), self._targets[classes])
    of_kind = {
      f"acc1_{kind}": float(correct[:, [i for i, attribute in enumerate(ATTRIBUTES) if attribute == kind]].mean())
      for kind in dict.fromkeys(ATTRIBUTES)
    }
    return {
      "acc1": float(correct.all(axis=1).mean()),
      "acc1_attributes": float(correct.mean()),
      **of_kind,
      **trained.accuracy,
    }
