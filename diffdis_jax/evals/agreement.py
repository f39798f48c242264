"""Do generated shapes show what was asked for? An independent classifier, trained on real renders only, judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.data import shapes
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base

JUDGE_SIZE = 32  # pixels: the classifier sees every image at this size
COLOURS = tuple(shapes.COLOURS)
PAIRS = np.array([(COLOURS.index(colour), shapes.SHAPES.index(shape)) for colour, shape in shapes.PAIRS])
SEEN = np.array([pair in shapes.SEEN for pair in shapes.PAIRS])


class Classifier(nnx.Module):
  """Three convolutions, pooling and two heads; it shares nothing with the model that it judges.

  Besides the pixels it sees how much each of them differs from the background, which is taken from the border.
  """

  def __init__(self, *, rngs: nnx.Rngs, widths: tuple[int, int, int] = (24, 48, 96)):
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

  def __call__(self, image: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
    """Logits of the colour and of the shape."""
    x = image.astype(jnp.float32) / 127.5 - 1
    border = jnp.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], axis=1)
    contrast = jnp.abs(x - jnp.median(border, axis=1)[:, None, None]).sum(-1, keepdims=True)
    x = jnp.concatenate([x, 2 * contrast / (contrast.max((1, 2), keepdims=True) + 1e-3) - 1], axis=-1)
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
    pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1)
    return self.colour(pooled), self.shape(pooled)


def render(*, image_size: int, num_images: int, seed: int) -> UInt8[np.ndarray, "n h w 3"]:
  """Real images of all the classes in turn, drawn at the generator's size and then brought to the judge's."""
  source = shapes.Shapes(split="all", image_size=image_size, seed=seed, num_images=num_images)
  return np.stack([base.to_square(source[i]["image"], JUDGE_SIZE) for i in range(num_images)])


def train_classifier(
  *, image_size: int, seed: int, num_steps: int, batch_size: int = 64, num_images: int = 8192
) -> Classifier:
  """Trains on `num_images` renders by Adam under a cosine schedule."""
  images = render(image_size=image_size, num_images=num_images, seed=seed)
  targets = PAIRS[np.arange(num_images) % len(PAIRS)]
  model = Classifier(rngs=nnx.Rngs(seed))
  optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(4e-3, num_steps)), wrt=nnx.Param)

  @nnx.jit
  def step(model: Classifier, optimizer: nnx.Optimizer, image: Array, target: Int[Array, "b 2"]) -> None:
    def loss(model: Classifier) -> Array:
      losses = [
        optax.softmax_cross_entropy_with_integer_labels(logits, target[:, i]).mean()
        for i, logits in enumerate(model(image))
      ]
      return losses[0] + losses[1]

    grads = nnx.grad(loss)(model)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
      optimizer.update(model, grads)

  rng = np.random.default_rng(seed)
  for _ in range(num_steps):
    rows = rng.integers(num_images, size=batch_size)
    step(model, optimizer, jnp.asarray(images[rows]), jnp.asarray(targets[rows]))
  return model


def judge(model: Classifier, images: UInt8[np.ndarray, "n h w 3"], *, batch_size: int = 256) -> Int[np.ndarray, "n 2"]:
  """The colour's and the shape's number, as the classifier sees them."""
  apply = nnx.jit(lambda model, image: jnp.stack([logits.argmax(-1) for logits in model(image)], axis=-1))
  found = []
  for start in range(0, len(images), batch_size):
    part = images[start : start + batch_size]
    padded = np.pad(part, ((0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)))
    found.append(np.asarray(jax.device_get(apply(model, padded)))[: len(part)])
  return np.concatenate(found)


class Agreement:
  """The share of generated images that are right in both colour and shape, on seen and on unseen pairs.

  Args:
    per_class: images generated for each of the 64 classes.
    template: the prompt, `{}` for the class name.
    seed: of the initial noise, and of the classifier.
    classifier_steps: training steps of the classifier.
    required_accuracy: on fresh renders; a worse classifier is no judge.
  """

  task = "generation_agreement"

  def __init__(
    self,
    *,
    per_class: int = 4,
    template: str = "a {}",
    seed: int = 0,
    classifier_steps: int = 500,
    required_accuracy: float = 0.98,
  ):
    self._per_class = per_class
    self._template = template
    self._seed = seed
    self._classifier_steps = classifier_steps
    self._required_accuracy = required_accuracy
    self._judges: dict[int, tuple[Classifier, float]] = {}

  def protocol(self, inference: Any) -> dict[str, Any]:
    """How `run` measures with this inference."""
    return {
      **inference.generation_protocol,
      "seed": self._seed,
      "num_images": self._per_class * len(PAIRS),
      "num_classes": len(PAIRS),
      "templates": [self._template],
      "classifier_steps": self._classifier_steps,
    }

  def get_judge(self, image_size: int) -> tuple[Classifier, float]:
    """The classifier for images of this size, trained when first asked for, and its accuracy on fresh renders.

    Raises:
      UserError: its accuracy is below what is required.
    """
    if image_size not in self._judges:
      model = train_classifier(image_size=image_size, seed=self._seed, num_steps=self._classifier_steps)
      fresh = render(image_size=image_size, num_images=2048, seed=self._seed + 1)
      right = (judge(model, fresh) == PAIRS[np.arange(len(fresh)) % len(PAIRS)]).all(axis=-1)
      accuracy = float(right.mean())
      logging.info("the independent classifier is right on %.2f %% of fresh renders", 100 * accuracy)
      if accuracy < self._required_accuracy:
        raise UserError(
          f"the classifier that should judge is right on only {accuracy:.1%} of real renders, below "
          f"{self._required_accuracy:.0%}; train it for more than {self._classifier_steps} steps (classifier_steps)"
        )
      self._judges[image_size] = model, accuracy
    return self._judges[image_size]

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Shares right in both, on all, seen and unseen pairs; right in colour, in shape; the judge's own accuracy."""
    model, accuracy = self.get_judge(inference.image_size)
    classes = np.tile(np.arange(len(PAIRS)), self._per_class)
    prompts = [self._template.format(shapes.CLASSNAMES[k]) for k in classes]
    noise = inference.noise(len(classes), self._seed)
    images = inference.generate(params, Tokenizer(inference.max_length)(prompts), noise)
    found = judge(model, np.stack([base.to_square(image, JUDGE_SIZE) for image in images]))
    colour, shape = (found == PAIRS[classes]).T
    both, seen = colour & shape, SEEN[classes]
    return {
      "agreement": float(both.mean()),
      "agreement_seen": float(both[seen].mean()),
      "agreement_unseen": float(both[~seen].mean()),
      "agreement_colour": float(colour.mean()),
      "agreement_shape": float(shape.mean()),
      "classifier_accuracy": accuracy,
    }
