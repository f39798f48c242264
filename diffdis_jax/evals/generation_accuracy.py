"""Measure whether generated images of rendered shapes show what was asked for, as a small classifier names them.

A classifier errs too, so its own accuracy on real images stands beside every figure. It shares nothing with the model
that it judges: neither weights nor layers. It is not the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx, struct
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.common import progress
from diffdis_jax.config.section import field, number
from diffdis_jax.data import shapes
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts

SIZE = 32  # pixels: a classifier sees every image at this size
COLOURS = tuple(shapes.COLOURS)
PAIRS = np.array([(COLOURS.index(colour), shapes.SHAPES.index(shape)) for colour, shape in shapes.PAIRS])
BATCH = 64
SEEN = np.array([pair in shapes.SEEN for pair in shapes.PAIRS])
OF_SHAPES = ("classifier_steps", "required_accuracy")  # settings of the classifier


@base.settings()
class GenerationAccuracy(base.Evaluation):
  """Task `generation_accuracy`: the share of generated images that show what was asked for, as a classifier judges.

  The images are of rendered shapes, and right are those of the colour and the shape asked for. Source: none; it stands
  for FID where there are too few images for that.
  """

  task = "generation_accuracy"

  template: str = field("", help="the prompt, {} for the name; by default 'a {}'")
  per_class: int | None = number(None, ge=1, help="images generated for each class; by default 4")
  classifier_steps: int | None = number(None, ge=1, help="steps of the classifier; by default 500")
  required_accuracy: float | None = field(
    None, help="accuracy that the classifier must reach on new renders; by default 0.98"
  )

  def open(self) -> None:
    self.named_by = self.make_judge()
    copies: int = self.named_by.per_class if self.per_class is None else self.per_class
    self.prompt = prompts.resolve_templates((self.template or self.named_by.template,))[0]
    self.classes = np.tile(self.named_by.asked, copies)

  def make_judge(self) -> Any:
    """Return what judges the images."""
    return ShapeJudge(self.seed, **self.given(OF_SHAPES))

  def given(self, names: Sequence[str]) -> dict[str, Any]:
    """Return those of these settings that are given."""
    return {name: value for name in names if (value := getattr(self, name)) is not None}

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **inference.generation_protocol,
      "seed": self.seed,
      "num_images": len(self.classes),
      "num_classes": len(self.named_by.classnames),
      "templates": [self.prompt],
      "judge": self.named_by.protocol(),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1 of generated images, and judge_acc1 of real ones that the judge was not trained on.

    Also acc1_seen and acc1_unseen, of pairs that training saw and of others, and acc1_colour and acc1_shape.

    Of a run with a head also head_similarity, ⟨ê_0, e⟩ of image and prompt, and head_acc1, the share that its own head
    takes for what was asked for among all classes.
    """
    # Before anything is generated, which takes longer: a classifier that is no judge ends it.
    self.named_by.train(inference.image_size)
    texts = [prompts.fill(self.prompt, name) for name in self.named_by.classnames]
    tokens = Tokenizer(inference.max_length)([texts[k] for k in self.classes])
    images = inference.generate(params, tokens, inference.noise(len(tokens), self.seed))
    metrics = self.named_by.measure(images, self.classes, image_size=inference.image_size)
    return metrics | (self.judge_by_head(inference, params, images, texts) if inference.aligned else {})

  def judge_by_head(
    self, inference: Any, params: Mapping[str, Any], images: UInt8[np.ndarray, "n h w 3"], texts: Sequence[str]
  ) -> dict[str, float]:
    """Measure by the model's own head, which judges not the images' truth but whether the model's two sides agree."""
    e = base.embed_texts(inference, params, texts)
    q = inference.embed_images(params, images, seed=self.seed)
    groups = np.unique(texts, return_inverse=True)[1]  # classes of one name are one
    places = base.ranks(q, e, query_groups=groups[self.classes], key_groups=groups)
    similarity = float((q * e[self.classes]).sum(axis=1).mean())
    return {"head_similarity": similarity, "head_acc1": float((places == 0).mean())}


class ShapeJudge:
  """Names colour and shape of rendered shapes, after training on renders. Settings as `GenerationAccuracy` has them."""

  classnames, template, per_class = tuple(shapes.CLASSNAMES), "a {}", 4

  def __init__(self, seed: int, *, classifier_steps: int = 500, required_accuracy: float = 0.98):
    self.asked = np.arange(len(PAIRS))
    self._seed, self._steps, self._required = seed, classifier_steps, required_accuracy
    self._trained: dict[int, Trained] = {}

  def protocol(self) -> dict[str, Any]:
    """Return how the classifier is trained."""
    return {"steps": self._steps}

  def train(self, image_size: int) -> Trained:
    """Train the classifier for generated images of this size, once. Raises UserError: its accuracy is below what is
    required."""
    if image_size not in self._trained:
      logging.info("training an independent classifier of renders")
      # Renders are made at the generator's size and shrunk as its images are, so that they are as sharp or as blurred.
      model = train_on_shapes(image_size=image_size, seed=self._seed, num_steps=self._steps)
      fresh = render(image_size=image_size, num_images=2048, seed=self._seed + 1)
      right = (pairs_of(model, fresh) == PAIRS[np.arange(len(fresh)) % len(PAIRS)]).all(axis=-1)
      self._trained[image_size] = Trained(model, {"judge_acc1": float(right.mean())})
      require(self._trained[image_size], self._required, self._steps)
    return self._trained[image_size]

  def measure(
    self, images: UInt8[np.ndarray, "n h w 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    """Return the accuracy of colour and shape together, of all, seen and unseen pairs; of the colour; of the shape."""
    trained = self.train(image_size)
    squares = np.stack([base.to_square(image, SIZE) for image in images])
    colour, shape = (pairs_of(trained.model, squares) == PAIRS[classes]).T
    pair, seen = colour & shape, SEEN[classes]
    right = {"": pair, "_seen": pair[seen], "_unseen": pair[~seen], "_colour": colour, "_shape": shape}
    return {**{f"acc1{which}": float(hits.mean()) for which, hits in right.items()}, **trained.accuracy}


def require(trained: Trained, least: float, steps: int) -> None:
  """Check that a classifier of renders can judge. Raises UserError: its accuracy is below `least`."""
  accuracy = trained.accuracy["judge_acc1"]
  logging.info("the independent classifier is right on %.2f %% of new renders", 100 * accuracy)
  if accuracy < least:
    raise UserError(
      f"the classifier that should judge is right on only {accuracy:.1%} of real renders, below {least:.0%}; train it"
      f" for more than {steps} steps (classifier_steps)"
    )


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
    halving = [nnx.Conv(4, first, (5, 5), strides=2, rngs=rngs), nnx.Conv(first, second, (3, 3), strides=2, rngs=rngs)]
    self.convs = nnx.List([*halving, nnx.Conv(second, third, (3, 3), rngs=rngs)])
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

  def batches() -> Iterator[Examples]:
    bar = progress.Progress("trained the independent classifier", num_steps, "steps")
    for _ in range(num_steps):
      # Rows are drawn with replacement, so that the number of steps is free of the number of renders.
      yield Examples(images[rows := rng.integers(num_images, size=batch_size)], targets[rows])
      bar.add()

  fit(model, optax.adam(optax.cosine_decay_schedule(4e-3, num_steps)), loss, batches())
  return model


def pairs_of(model: ShapeClassifier, images: UInt8[np.ndarray, "n s s 3"]) -> Int[np.ndarray, "n 2"]:
  """Return the colour's and the shape's number, as the classifier sees them."""

  def named(model: ShapeClassifier, image: Array) -> Int[Array, "b 2"]:
    logits = model(image)
    return jnp.stack([logits.colour.argmax(-1), logits.shape.argmax(-1)], axis=-1)

  return apply(named, model, images, batch_size=256)
